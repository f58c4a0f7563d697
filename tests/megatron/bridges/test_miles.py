"""miles' routing manager, on stock Megatron and on its fork, with MTP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FULL

import r3patch
from r3patch import Routes, _config, bridges

from .common import (
    EXPERTS,
    NATIVE,
    Calls,
    as_map,
    assert_mtp_is_megatrons_own,
    build,
    fails_after,
    forked,
    loss_of,
    main,
    mtp,
    random_ids,
)

pytestmark = pytest.mark.megatron


def fork(manager: Any) -> Any:
    """miles' Megatron fork."""
    return forked(
        register=lambda router: manager.register_to_module(router, "routing_replay"),
        wrap=lambda topk: manager.get_topk_fn(topk, return_probs=True),
    )


@pytest.mark.parametrize("recompute", [{}, FULL], ids=["no_recompute", "full"])
def test_stock_megatron(miles: Any, recompute: dict[str, Any]) -> None:
    """Its fill by position and its two stages work unchanged, without the Megatron fork."""
    model = build(**recompute)
    assert miles.replays == [router.routing_replay for router in main(model)]
    assert not hasattr(mtp(model), "routing_replay")
    ids = [random_ids(seed) for seed in (2, 3)]
    for replay, rows in zip(miles.replays, ids, strict=True):
        replay.top_indices_list.append(rows.int())
    calls = Calls(model)
    miles.stage = "replay_forward"
    loss = loss_of(model)
    miles.stage = "replay_backward"
    loss.backward()
    for layer in (2, 3):
        assert len(calls.maps(layer)) == (2 if recompute else 1)
        for routing_map in calls.maps(layer):
            assert torch.equal(routing_map, as_map(ids[layer - 2]))
    cursors = [(replay.forward_index, replay.backward_index) for replay in miles.replays]
    assert cursors == [(1, 1 if recompute else 0)] * 2
    assert_mtp_is_megatrons_own(calls)


def test_its_fork(miles: Any) -> None:
    """An MTP call moves no cursor, though `current` is the last main router's stream."""
    with fork(miles):
        model = build()
        assert len(miles.replays) == 2
        ids = [random_ids(seed) for seed in (2, 3)]
        for replay, rows in zip(miles.replays, ids, strict=True):
            replay.top_indices_list += [rows, random_ids(9)]
        calls = Calls(model)
        miles.stage = "replay_forward"
        loss_of(model)
        assert miles.stage == "replay_forward"
        with pytest.raises(r3patch.UnsupportedRoutingError, match="manager miles is replaying"):
            r3patch.record(model).__enter__()
    assert [replay.forward_index for replay in miles.replays] == [1, 1]
    assert torch.equal(calls.maps(3)[0], as_map(ids[1]))
    assert_mtp_is_megatrons_own(calls)


def test_an_exception_in_an_mtp_forward_gives_the_stage_back(
    miles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first published fix lacked: after an exception the manager is as it was."""
    model = build()
    for replay in miles.replays:
        replay.top_indices_list.append(random_ids(2))
    monkeypatch.setattr(mtp(model), "gating", fails_after(lambda self: None).__get__(mtp(model)))
    miles.stage = "replay_forward"
    with pytest.raises(TypeError):
        loss_of(model)
    assert miles.stage == "replay_forward"


def test_an_exception_before_the_manager_was_put_to_rest(
    miles: Any, recwarn: pytest.WarningsRecorder
) -> None:
    """Somebody else's hook raises first: there is nothing to give back, and nothing is."""
    router = mtp(build())

    def raises(*args: Any) -> None:
        raise RuntimeError("boom")

    router.register_forward_pre_hook(raises, prepend=True)
    miles.stage = "replay_forward"
    with pytest.raises(RuntimeError, match="boom"):
        router(torch.randn(2, 2, router.config.hidden_size))
    assert miles.stage == "replay_forward"
    assert not [w for w in recwarn if "silenced" in str(w.message)]


def test_a_disabled_manager_replays_nothing(miles: Any) -> None:
    """Its stage says nothing then."""
    router = main(build())[0]
    miles.stage, miles.enabled = "replay_forward", False
    assert bridges.replaying(router, router.router_replay) is None


def test_a_session(miles: Any) -> None:
    """An active stage is refused; at rest the session replays, and miles' tap comes back."""
    model = build()
    taps = [router.router_replay for router in main(model)]
    routes = Routes(torch.stack([random_ids(2), random_ids(3)], dim=1), (2, 3), num_experts=EXPERTS)
    miles.stage = "replay_forward"
    with pytest.raises(r3patch.UnsupportedRoutingError, match="manager miles is replaying"):
        r3patch.replay(model, [routes]).__enter__()
    miles.stage = "fallthrough"
    calls = Calls(model)
    with r3patch.replay(model, [routes]):
        loss_of(model).backward()
    assert torch.equal(calls.maps(2)[0], as_map(routes.experts[:, 0]))
    assert [router.router_replay for router in main(model)] == taps
    assert [replay.forward_index for replay in miles.replays] == [0, 0]


def test_a_disabled_manager_registers_nothing(miles: Any) -> None:
    """A critic, built while the manager is off, has no streams."""
    miles.enabled = False
    model = build()
    assert miles.replays == []
    assert all(router.router_replay is None for router in main(model))


def test_an_enabled_manager_goes_before_the_native_one(
    miles: Any, registry: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Never two replays on one call: miles drives, and native instances leave their registry."""
    model = build(**NATIVE)
    assert registry == []
    assert caplog.text.count("goes before Megatron's own RouterReplay") == 1
    for replay in miles.replays:
        replay.top_indices_list.append(random_ids(2))
    miles.stage = "replay_forward"
    calls = Calls(model)
    loss_of(model)
    assert torch.equal(calls.maps(2)[0], as_map(random_ids(2)))


def test_native_left_alone_under_miles(miles: Any, registry: list[Any]) -> None:
    """R3PATCH_NATIVE=leave holds for an enabled manager, too: the list is as Megatron left it."""
    with _config.override(native="leave"):
        build(**NATIVE)
    assert len(registry) == 3


def test_fused_routing_is_said(miles: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The fused kernel returns before the manager is asked, so its routes would not be used."""
    model = build()
    router = main(model)[0]
    del router.routing_replay
    router.router_replay = None
    miles.replays.clear()
    router.config.moe_router_fusion = True
    bridges._govern(router)
    assert "moe_router_fusion returns before any replay" in caplog.text
