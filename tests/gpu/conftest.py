"""Stock Megatron on the card; skipped where there is none, unless ``--device cpu`` is given."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS: results repeat
sys.path.insert(1, str(Path(__file__).parents[2] / "benchmarks"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="of tests/gpu: cuda, or cpu for a rehearsal")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the tests run."""
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device; --device cpu rehearses these tests")
    return torch.device("cuda", 0) if device.type == "cuda" else device


@pytest.fixture(scope="session")
def on_card(device: torch.device) -> None:
    """For what a CPU has not: streams, pinned memory, waits, graphs."""
    if device.type == "cpu":
        pytest.skip("a CPU has neither streams nor pinned memory")


@pytest.fixture(scope="module")
def megatron(device: torch.device) -> Iterator[None]:
    """Stock Megatron in a world of one."""
    from device import megatron_on

    with megatron_on(device):
        yield


@pytest.fixture(scope="module")
def cpu(megatron: None) -> None:
    """What the tests of tests/megatron ask for is the card here (test_megatron.py)."""


@pytest.fixture
def repeatable() -> Iterator[None]:
    """Megatron adds the experts' outputs up in the same order each time.

    Source: ``unpermute``, megatron/core/transformer/moe/moe_utils.py, 0.16.1 and 0.19.2.
    """
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(mode=False)
