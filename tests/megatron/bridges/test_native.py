"""Megatron's own RouterReplay on stock Megatron with MTP: its registry, its data, its actions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FULL

import r3patch
from r3patch import Routes, _config
from r3patch.bridges import native
from r3patch.labels import scope as scopes

from .common import (
    EXPERTS,
    NATIVE,
    TOKENS,
    TOPK,
    Calls,
    as_map,
    assert_mtp_is_megatrons_own,
    build,
    fails_after,
    loss_of,
    main,
    mtp,
    random_ids,
)

pytestmark = pytest.mark.megatron


def test_the_registry_has_main_routers_only(registry: list[Any]) -> None:
    """The MTP router's instance is not in the list, and the router has none."""
    model = build(**NATIVE)
    assert registry == [router.router_replay for router in main(model)]
    assert mtp(model).router_replay is None


@pytest.mark.parametrize("recompute", [{}, FULL], ids=["no_recompute", "full"])
def test_decoder_only_data(recompute: dict[str, Any]) -> None:
    """set_replay_data takes the decoder's layers, main routers use them, MTP keeps its own."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    model = build(**NATIVE, **recompute)
    calls = Calls(model)
    ids = [random_ids(seed) for seed in (2, 3)]
    RouterReplay.set_replay_data(ids)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    loss = loss_of(model)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
    loss.backward()
    for layer in (2, 3):
        assert len(calls.maps(layer)) == (2 if recompute else 1)
        for routing_map in calls.maps(layer):
            assert torch.equal(routing_map, as_map(ids[layer - 2]))
    assert_mtp_is_megatrons_own(calls)


def test_a_round_trip() -> None:
    """What get_recorded_data gives, set_replay_data takes: the same layers both ways."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    model = build(**NATIVE)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    plain = loss_of(model)
    recorded = RouterReplay.get_recorded_data()
    assert [ids.shape for ids in recorded] == [(TOKENS, TOPK)] * 2
    RouterReplay.set_replay_data(recorded)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    assert torch.equal(loss_of(model), plain)


def test_a_session_sets_instances_aside() -> None:
    """replay() works on such a model; afterwards each router has its own instance, untouched."""
    model = build(**NATIVE)
    before = [router.router_replay for router in main(model)]
    calls = Calls(model)
    ids = torch.stack([random_ids(2), random_ids(3)], dim=1)
    with r3patch.replay(model, [Routes(ids, (2, 3), num_experts=EXPERTS)]):
        loss_of(model).backward()
    assert torch.equal(calls.maps(2)[0], as_map(ids[:, 0]))
    assert [router.router_replay for router in main(model)] == before
    assert all(replay.target_topk_idx is None for replay in before)


def test_an_active_action_is_refused() -> None:
    """Two replays on one call would contradict each other: the message names the manager."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    model = build(**NATIVE)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    with pytest.raises(r3patch.UnsupportedRoutingError, match="manager native is replaying"):
        r3patch.record(model).__enter__()


def test_drive_fills_the_live_model() -> None:
    """drive() sets rows by layer number, on this model only; invalid rows are refused."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    other, model = build(**NATIVE), build(**NATIVE)
    ids = torch.stack([random_ids(3), random_ids(2)], dim=1)
    native.drive(model, Routes(ids, (3, 2), num_experts=EXPERTS))
    assert all(router.router_replay.target_topk_idx is None for router in main(other))
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    calls = Calls(model)
    loss_of(model)
    assert torch.equal(calls.maps(2)[0], as_map(ids[:, 1]))
    assert torch.equal(calls.maps(3)[0], as_map(ids[:, 0]))
    gap = Routes(ids, (3, 2), torch.arange(TOKENS) > 0, num_experts=EXPERTS)
    with pytest.raises(r3patch.RoutesError, match="rows without routes"):
        native.drive(model, gap)
    native.drive(model, gap, missing="spread")
    with pytest.raises(r3patch.ReplayError, match="moe_enable_routing_replay"):
        native.drive(build(), Routes(ids, (3, 2), num_experts=EXPERTS))


def test_drive_refuses_instances_that_no_action_reaches(registry: list[Any]) -> None:
    """After somebody cleared Megatron's list, drive() names the routers and fills none."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    model = build(**NATIVE)
    first, second = (router.router_replay for router in main(model))
    routes = Routes(torch.stack([random_ids(2), random_ids(3)], 1), (2, 3), num_experts=EXPERTS)
    RouterReplay.clear_global_router_replay_instances()
    registry.append(first)
    with pytest.raises(r3patch.ReplayError) as caught:
        native.drive(model, routes)
    assert str(caught.value).startswith(
        "the RouterReplay of decoder.layers.2.mlp.router is not in Megatron's global list"
    )
    assert "set_router_replay_action(action), before drive()" in str(caught.value)
    assert first.target_topk_idx is None

    def drive_and_run() -> torch.Tensor:
        native.drive(model, routes)
        RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        calls = Calls(model)
        loss_of(model)
        return calls.maps(3)[0]

    second.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)  # on the instance itself
    assert torch.equal(drive_and_run(), as_map(random_ids(3)))
    second.clear_router_replay_action()
    registry.append(second)  # back in the list
    assert torch.equal(drive_and_run(), as_map(random_ids(3)))


def test_drive_keeps_no_hold_of_the_routes() -> None:
    """Spread rows and later changes of either side stay on that side."""
    model = build(**NATIVE)
    routes = Routes(
        random_ids(2)[:, None].repeat(1, 2, 1),
        (2, 3),
        torch.arange(TOKENS) > 0,
        num_experts=EXPERTS,
    )
    before = routes.experts.clone()
    native.drive(model, routes, missing="spread")
    targets = [router.router_replay.target_topk_idx for router in main(model)]
    assert torch.equal(routes.experts, before)
    assert all(target[0].unique().numel() == TOPK for target in targets)
    routes.experts.zero_()
    assert all(torch.equal(target[1:], random_ids(2)[1:]) for target in targets)


def test_drive_refuses_a_model_without_routers() -> None:
    """Nothing would be driven, which is never what was meant."""
    routes = Routes(torch.stack([random_ids(2), random_ids(3)], 1), (2, 3), num_experts=EXPERTS)
    with pytest.raises(r3patch.ReplayError, match="the model has no RouterReplay to drive"):
        native.drive(torch.nn.Linear(1, 1), routes)


def test_left_alone(registry: list[Any]) -> None:
    """With the bridge off the MTP instance stays where Megatron put it."""
    with _config.override(native="leave"):
        model = build(**NATIVE)
    assert len(registry) == 3
    assert registry[-1] is mtp(model).router_replay


def test_an_exception_in_an_mtp_constructor(
    registry: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list holds what a plain run would hold, without MTP; the next model is governed too."""
    from megatron.core.transformer import multi_token_prediction

    layer = multi_token_prediction.MultiTokenPredictionLayer
    monkeypatch.setattr(layer, "__init__", fails_after(layer.__init__))
    with pytest.raises(RuntimeError, match="boom"):
        build(**NATIVE)
    assert len(registry) == 2
    monkeypatch.undo()
    assert scopes.current() == "main"
    model = build(**NATIVE)
    assert registry[2:] == [router.router_replay for router in main(model)]


def test_a_head_labelled_later_leaves_the_registry(registry: list[Any]) -> None:
    """label(head, scope="mtp") takes a router out that was built as a main one."""
    model = build(**NATIVE)
    head = model.decoder.layers[2]
    replay = head.mlp.router.router_replay
    r3patch.label(head, scope="mtp")
    assert all(known is not replay for known in registry)
    assert head.mlp.router.router_replay is None


@pytest.mark.feature(
    "module:megatron.core.transformer.moe.router_replay:RouterReplay.set_global_static_buffers"
)
def test_inference_buffers_have_main_layers() -> None:
    """The buffer that Megatron's inference engine sets (0.17 and newer) has no MTP column."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    model = build(**NATIVE)
    buffer = torch.full((TOKENS, 2, TOPK), -1)
    RouterReplay.set_global_static_buffers(buffer)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    loss_of(model)
    assert (buffer >= 0).all()


@pytest.mark.parametrize("kind", ["record", "replay"])
def test_an_action_that_is_set_during_a_session_is_refused(kind: str) -> None:
    """Its routes would not be used: the session's taps are in its place."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    model = build(**NATIVE)
    ids = torch.stack([random_ids(seed) for seed in (2, 3)], dim=1)
    routes = Routes(ids, (2, 3), num_experts=EXPERTS)
    session = r3patch.record(model) if kind == "record" else r3patch.replay(model, [routes])

    def run() -> None:
        with session:
            RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
            loss_of(model)

    with pytest.raises(r3patch.ReplayError, match="manager native was switched on during this"):
        run()
    RouterReplay.clear_global_router_replay_action()
