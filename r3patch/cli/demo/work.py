"""The demo's arms side by side, each worker a process of its own: Python threads would queue."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from r3patch._errors import R3PatchError, ReplayError
from r3patch.cli.demo.results import REPLAY, Arm, Excerpt, Point


@dataclass(frozen=True)
class Task:
    """What the workers need to know."""

    steps: int
    seed: int
    weights: Path
    trace: Path  # of the arm with replay


def run(
    arms: Sequence[Arm], task: Task, workers: int
) -> Iterator[tuple[Arm, Point | Excerpt | None]]:
    """Yields what the arms do as they do it: an item for each step, None where it has no news.

    Raises:
        ReplayError: a worker died.
        Exception: what a worker raised.
    """
    pipes: dict[Connection, Any] = {}
    spawn = multiprocessing.get_context("spawn")
    try:
        for number in range(workers):
            ours, theirs = spawn.Pipe(duplex=False)
            args = (theirs, arms[number::workers], task)
            process = spawn.Process(target=_work, args=args, daemon=True)
            with _interrupts_kept_back():
                process.start()
            theirs.close()
            pipes[ours] = process
        while pipes:
            for pipe in wait(list(pipes)):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv()
                except EOFError:
                    message = None
                if message is None:
                    _end(pipes.pop(pipe))
                elif isinstance(message, BaseException):
                    raise message
                else:
                    yield message
    finally:
        for process in pipes.values():
            process.terminate()
            process.join()


def _end(process: Any) -> None:
    process.join()
    if process.exitcode:
        raise ReplayError(
            f"a worker of the demo ended early, with exit status {process.exitcode}. What it said "
            "is above; -9 is what a machine without enough memory does."
        )


@contextmanager
def _interrupts_kept_back() -> Iterator[None]:
    """For a process that starts here, which never gets them; this one gets them afterwards.

    Ctrl-C goes to all processes, and one of them should answer. Ignored, it would be lost here.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # its start lets them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, arms: Sequence[Arm], task: Task) -> None:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Megatron's jit_fuser wants a C++ compiler
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.filterwarnings("ignore")  # Megatron's, about kernels that a CPU has no use for
    logging.disable(logging.WARNING)
    try:
        import torch

        from r3patch import testing
        from r3patch.cli.demo.arms import train_on

        torch.set_num_threads(1)
        with testing.megatron_on_cpu():
            for arm in arms:
                trace = task.trace if arm == REPLAY else None
                for news in train_on(arm, task.steps, task.seed, task.weights, trace):
                    pipe.send((arm, news))
    except (ImportError, OSError, R3PatchError) as error:  # what the command line knows to tell
        pipe.send(error)
    pipe.send(None)
