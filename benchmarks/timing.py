"""Ratios of times on a machine that others use, too: interleaved rounds, medians of ratios.

A round runs every variant once, in an order of its own, so that a neighbour's load falls on all of
them alike; a variant's ratio in a round is its time over the reference's in the *same* round; what
is reported is the median over the rounds, with the quartiles. The collector of garbage runs between
the rounds only. glibc is told to keep freed memory: a tensor of some megabytes would otherwise be
mapped anew at each call, and the page faults, which no caching allocator of a GPU has, would be a
tenth of what is measured and more (`keep_freed_memory`).

On a GPU a call has two times, both its own: what the host takes to launch it (`launching`), and
what the device takes to run it (`running`). A whole step, in which Megatron waits for the device,
has one (`passing`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_GIGABYTE = 2**30
_CYCLES = 15_000_000  # of a GPU: 8 to 10 ms, in which a router's calls are launched


def nothing() -> None:
    """The preparation of what needs none."""


@dataclass(frozen=True)
class Variant:
    """One thing to time: ``run`` is timed, ``prepare`` before it is not."""

    run: Callable[[], object]
    prepare: Callable[[], object] = nothing


@dataclass(frozen=True)
class Ratio:
    """The median over the rounds, and the quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}"


def keep_freed_memory() -> bool:
    """Ask glibc's malloc for no mapping and no trimming; whether it heard (Linux with glibc)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _GIGABYTE) and mallopt(_M_TRIM_THRESHOLD, _GIGABYTE))


def computing(run: Callable[[], object]) -> float:
    """Seconds of this thread on the CPU."""
    begin = time.thread_time()
    run()
    return time.thread_time() - begin


def launching(run: Callable[[], object]) -> float:
    """Seconds until the host has launched everything on an idle GPU, which may still run it."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    end = time.perf_counter()
    torch.cuda.synchronize()
    return end - begin


def running(run: Callable[[], object]) -> float:
    """Seconds of a GPU that has everything queued: no time of the host's is in it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_CYCLES)  # the host launches meanwhile
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def passing(run: Callable[[], object]) -> float:
    """Seconds from an idle GPU to an idle GPU."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(
    variants: Mapping[str, Variant],
    repeats: int,
    warmup: int = 3,
    clock: Callable[[Callable[[], object]], float] = computing,
    limit: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds of each variant, round by round.

    Args:
        variants: by name.
        repeats: rounds.
        warmup: rounds before them, which are not counted.
        clock: one of the four above.
        limit: seconds after which no other round is begun, but for the first five.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)  # noqa: S311 - an order, no secret
    deadline = time.monotonic() + limit
    with _no_collector():
        for number in range(warmup + repeats):
            if number >= warmup + 5 and time.monotonic() > deadline:
                break
            gc.collect(0)
            for name in order.sample(sorted(variants), len(variants)):
                variants[name].prepare()
                spent = clock(variants[name].run)
                if number >= warmup:
                    seconds[name].append(spent)
    return seconds


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Of two variants of one `measure`."""
    ratios = [one / other for one, other in zip(seconds, reference, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return Ratio(median, low, high)


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
