"""A graph that captures a router in a session would repeat one microbatch's rows: refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stack import Stack, random_routes

import r3patch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("megatron", "on_card")]


@pytest.fixture
def router(device: torch.device) -> Any:
    """A stack of one router, run before any capture, and its input."""
    stack = Stack("softmax", 1).to(device)
    x = torch.randn(64, 1, stack.config.hidden_size, device=device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            stack(x)
    torch.cuda.current_stream().wait_stream(side)
    return stack, x


def capture(stack: Stack, x: torch.Tensor) -> Any:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        stack(x)
    return graph


def test_a_stock_router_can_be_captured(router: Any) -> None:
    """Without a session, so that the refusal below is the session's."""
    capture(*router).replay()
    torch.cuda.synchronize()


@pytest.mark.parametrize("kind", ["replay", "record"])
def test_a_capture_in_a_session_is_refused(router: Any, kind: str) -> None:
    """By name, and the session goes on outside of the capture."""
    stack, x = router
    rows = random_routes(stack.layers, 64, experts=16, topk=4, seed=0)
    session = r3patch.replay(stack, [rows]) if kind == "replay" else r3patch.record(stack)
    with session:
        with pytest.raises(r3patch.UnsupportedRoutingError, match="CUDA graph"):
            capture(stack, x)
        with torch.no_grad():
            stack(x)
    torch.cuda.synchronize()
