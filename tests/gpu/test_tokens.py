"""Tokens are compared on the device, and a fault is found without waiting for it."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from card import build, keep_busy

import r3patch
from r3patch import Routes

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("megatron")]


def rows(model: Any, seed: int, *, shift: int = 0) -> Routes:
    routes = tiny.with_tokens(tiny.random_routes(model, seed), seed)
    assert routes.tokens is not None
    return Routes(
        routes.experts,
        routes.layers,
        num_experts=routes.num_experts,
        tokens=routes.tokens.roll(shift),
    )


@pytest.mark.parametrize("mode", ["check", "strict"])
def test_a_healthy_run_compares_all(mode: Any) -> None:
    """Stats say how many tokens were compared."""
    model = build()
    with r3patch.replay(model, [rows(model, 1), rows(model, 2)], tokens=mode) as session:
        tiny.step(model)
    (check,) = session.stats.token_checks
    assert (check.checked, check.wrong) == (2 * tiny.TOKENS, 0)


@pytest.mark.parametrize("busy", [False, True])
def test_a_shift_is_named_at_exit(busy: bool) -> None:
    """The forwards go through, however far behind the device is; leaving the block raises."""
    model = build()
    session = r3patch.replay(model, [rows(model, 1, shift=1), rows(model, 2)])
    session.open()
    if busy:
        keep_busy()
    tiny.step(model)
    with pytest.raises(r3patch.ReplayError, match="token"):
        session.close()


def test_a_shift_is_found_at_the_next_microbatch_in_strict(device: torch.device) -> None:
    """On a CPU at once; on a device when the next microbatch finds the comparison done."""
    model = build()
    session = r3patch.replay(
        model, [rows(model, 1, shift=1), rows(model, 2)], tokens="strict"
    ).open()
    if device.type == "cuda":
        tiny.loss_of(model, 1)
        torch.cuda.synchronize()
    with pytest.raises(r3patch.ReplayError, match="token") as caught:
        tiny.loss_of(model, 2 if device.type == "cuda" else 1)
    session.close(caught.value)


def test_strict_waits_for_no_device(on_card: None) -> None:
    """Behind a busy stream the forward that is wrong returns; leaving the block raises."""
    model = build()
    session = r3patch.replay(model, [rows(model, 1, shift=1)], tokens="strict")
    session.open()
    keep_busy(300)
    tiny.loss_of(model, 1)
    with pytest.raises(r3patch.ReplayError, match="token"):
        session.close()


def test_two_microbatches_swapped_are_named() -> None:
    """The message says whose tokens came."""
    model = build()
    session = r3patch.replay(model, [rows(model, 2), rows(model, 1)])
    session.open()
    tiny.step(model)
    with pytest.raises(r3patch.ReplayError, match="microbatch"):
        session.close()


def test_routes_of_a_device_are_kept_on_the_host(device: torch.device) -> None:
    """Experts, mask and tokens on the card make the same Routes as on the host."""
    model = build()
    host = tiny.with_gaps(tiny.random_routes(model, 1))
    tokens = tiny.batch(1)["input_ids"].t().flatten()
    assert host.valid is not None
    made = [
        Routes(
            host.experts.long().to(there),
            host.layers,
            host.valid.to(there),
            num_experts=host.num_experts,
            tokens=tokens.to(there),
        )
        for there in (torch.device("cpu"), device)
    ]
    assert made[0] == made[1]
    for tensor in (made[1].experts, made[1].valid, made[1].tokens):
        assert tensor is not None
        assert tensor.device.type == "cpu"
    payload = tiny.random_routes(model, 1).experts
    sizes: dict[str, Any] = {"num_experts": host.num_experts, "topk": tiny.TOPK, "num_layers": 2}
    decoded = r3patch.decode(payload.to(device), tokens=tokens.to(device), **sizes)
    assert decoded == r3patch.decode(payload, tokens=tokens, **sizes)


def test_a_routers_rows_placed_on_the_card(device: torch.device) -> None:
    """A layout takes ids of the card."""
    layout = r3patch.Layout(packed=True, align=4)
    ids = [torch.arange(1, n, device=device) for n in (6, 9)]
    host = layout.place_ids([each.cpu() for each in ids])
    assert torch.equal(layout.place_ids(ids).cpu(), host)
