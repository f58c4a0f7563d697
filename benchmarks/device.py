"""Stock Megatron in one process, on the CPU or on a GPU."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

import torch

from r3patch import testing
from r3patch.testing._cpu import _parallel_state

CPU = torch.device("cpu")


def add_device(parser: argparse.ArgumentParser) -> None:
    """The argument ``--device`` of a benchmark."""
    parser.add_argument("--device", type=torch.device, default=CPU, help="cpu, or cuda")


@contextlib.contextmanager
def megatron_on(device: torch.device) -> Iterator[None]:
    """Megatron runs on this device inside the block, in a world of one.

    On a GPU nothing of Megatron or torch is replaced. Gloo is enough there: Megatron calls no
    collective of one rank.
    """
    if device.type == "cpu":
        with testing.megatron_on_cpu():
            yield
        return
    from megatron.core import tensor_parallel

    torch.cuda.set_device(device.index or 0)
    with _parallel_state():
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        yield
