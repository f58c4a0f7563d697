"""Two ranks on one machine, with a bound on their time."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp


def run_ranks(
    function: Callable[..., Any], *args: Any, ranks: int = 2, timeout: float = 120.0
) -> list[Any]:
    """Run ``function(*args)`` in as many spawned processes as there are ranks.

    Each process has the environment that ``torchrun`` gives (RANK, WORLD_SIZE, MASTER_ADDR,
    MASTER_PORT), so that `megatron_on_cpu` joins them.

    Args:
        function: importable by name, with picklable arguments and result.
        ranks: how many processes.
        timeout: seconds after which all of them are ended.

    Returns:
        What the ranks returned, by rank.

    Raises:
        TimeoutError: a rank did not finish in time.
        RuntimeError: a rank raised; with its traceback.
    """
    context = mp.get_context("spawn")
    results: Any = context.SimpleQueue()
    port = _free_port()
    children = [
        context.Process(target=_rank, args=(function, args, rank, ranks, port, results))
        for rank in range(ranks)
    ]
    for child in children:
        child.start()
    try:
        answers = _collect(children, results, timeout)
        for child in children:
            child.join(10)  # of itself: its exit handlers run
        return answers
    finally:
        for child in children:
            child.kill()
            child.join()


def torchrun(
    script: str | os.PathLike[str], *arguments: str, ranks: int = 2, timeout: float = 120.0
) -> tuple[int, str]:
    """Run a script by torchrun: its exit status, and the output of all ranks.

    Raises:
        subprocess.TimeoutExpired: it did not finish in time. The ranks are ended.
    """
    package, path = Path(__file__).parents[2], [os.environ.get("PYTHONPATH", "")]
    if package.name != "site-packages":  # found in the working directory, where a rank looks not
        path.append(str(package))
    environment = {
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    process = subprocess.Popen(
        [*launcher, f"--nproc-per-node={ranks}", os.fspath(script), *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.terminate()  # not killed: torchrun ends its ranks, which have sessions of their own
        process.wait(30)
    return process.returncode, output


def _collect(children: list[Any], results: Any, timeout: float) -> list[Any]:
    answers: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(answers) < len(children):
        while not results.empty():
            rank, answer, failure = pickle.loads(results.get())  # noqa: S301  # our own child
            if failure is not None:
                raise RuntimeError(f"rank {rank} raised:\n{failure}")
            answers[rank] = answer
        dead = [i for i, c in enumerate(children) if c.exitcode not in (None, 0)]
        if dead and results.empty():
            raise RuntimeError(f"rank {dead[0]} ended with code {children[dead[0]].exitcode}")
        if time.monotonic() > deadline:
            missing = sorted(set(range(len(children))) - set(answers))
            raise TimeoutError(f"ranks {missing} did not finish within {timeout:g} s")
        time.sleep(0.02)
    return [answers[rank] for rank in range(len(children))]


def _rank(function: Any, args: Any, rank: int, ranks: int, port: int, results: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # As bytes: torch's queues hand tensors over by a file that is gone with the rank.
    try:
        results.put(pickle.dumps((rank, function(*args), None)))
    except BaseException:
        results.put(pickle.dumps((rank, None, traceback.format_exc())))
        raise SystemExit(1) from None


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
