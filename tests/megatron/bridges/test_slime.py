"""slime's routing replay, on stock Megatron and with its Megatron patch, with MTP."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from tiny import FULL

from .common import (
    Calls,
    as_map,
    assert_mtp_is_megatrons_own,
    build,
    forked,
    loss_of,
    main,
    mtp,
    random_ids,
)

pytestmark = pytest.mark.megatron

RECOMPUTE = pytest.mark.parametrize("recompute", [{}, FULL], ids=["no_recompute", "full"])


def test_a_stage_that_was_not_set_stays_unset(slime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An MTP call leaves no variable behind, for child processes to find."""
    monkeypatch.delenv("ROUTING_REPLAY_STAGE", raising=False)
    router = mtp(build())
    router(torch.randn(2, 2, router.config.hidden_size))
    assert "ROUTING_REPLAY_STAGE" not in os.environ


@RECOMPUTE
def test_stock_megatron(
    slime: Any, monkeypatch: pytest.MonkeyPatch, recompute: dict[str, Any]
) -> None:
    """As many streams as MoE decoder layers, so the count in its fill holds; MTP is its own."""
    model = build(**recompute)
    streams = slime.RoutingReplay.all_routing_replays
    assert streams == [router.routing_replay for router in main(model)]
    ids = [random_ids(seed) for seed in (2, 3)]
    for replay, rows in zip(streams, ids, strict=True):
        replay.top_indices_list.append(rows)
    calls = Calls(model)
    monkeypatch.setenv("ROUTING_REPLAY_STAGE", "replay_forward")
    loss = loss_of(model)
    monkeypatch.setenv("ROUTING_REPLAY_STAGE", "replay_backward")
    loss.backward()
    for layer in (2, 3):
        for routing_map in calls.maps(layer):
            assert torch.equal(routing_map, as_map(ids[layer - 2]))
    cursors = [(stream.forward_index, stream.backward_index) for stream in streams]
    assert cursors == [(1, 1 if recompute else 0)] * 2
    assert_mtp_is_megatrons_own(calls)


def test_registered_by_its_own_patch(slime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With slime's Megatron patch nothing is registered twice, and MTP leaves the registry."""
    from megatron.core.transformer.moe.router import TopKRouter

    constructor = TopKRouter.__init__

    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        constructor(self, *args, **kwargs)
        if not hasattr(self, "routing_replay"):
            slime.register_routing_replay(self)

    with monkeypatch.context() as patch:
        patch.setattr(TopKRouter, "__init__", patched)
        model = build()
    streams = slime.RoutingReplay.all_routing_replays
    assert streams == [router.routing_replay for router in main(model)]
    assert not hasattr(mtp(model), "routing_replay")


@RECOMPUTE
def test_its_patch(slime: Any, monkeypatch: pytest.MonkeyPatch, recompute: dict[str, Any]) -> None:
    """With slime's top-k around every call, an MTP call moves no cursor and keeps the stage."""
    with forked(slime.register_routing_replay, slime.get_routing_replay_compute_topk):
        model = build(**recompute)
        streams = slime.RoutingReplay.all_routing_replays
        assert streams == [router.routing_replay for router in main(model)]
        for stream in streams:
            stream.top_indices_list += [random_ids(3), random_ids(9)]
        calls = Calls(model)
        monkeypatch.setenv("ROUTING_REPLAY_STAGE", "replay_forward")
        loss = loss_of(model)
        monkeypatch.setenv("ROUTING_REPLAY_STAGE", "replay_backward")
        loss.backward()
        cursors = [(stream.forward_index, stream.backward_index) for stream in streams]
        assert cursors == [(1, 1 if recompute else 0)] * 2
        assert os.environ["ROUTING_REPLAY_STAGE"] == "replay_backward"
    assert torch.equal(calls.maps(2)[0], as_map(random_ids(3)))
    monkeypatch.setenv("ENABLE_ROUTING_REPLAY", "0")
    assert_mtp_is_megatrons_own(calls)
