"""Microbatches in pieces and with rows that have no routes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import (
    EXPERTS,
    FULL,
    RECOMPUTE,
    ROUTING,
    TOKENS,
    TOPK,
    Calls,
    assert_close,
    assert_equal,
    build,
    gradients,
    layers,
    loss_of,
    random_routes,
    step,
    wanted_map,
    with_gaps,
)

import r3patch
from r3patch import Routes

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("cpu")]


@pytest.mark.feature("config:mlp_chunks_for_training")
@RECOMPUTE
def test_chunked_mlp(recompute: Any) -> None:
    """A router called once per piece of the sequence gets the pieces of its rows, in order."""

    def run(**overrides: Any) -> dict[str, torch.Tensor]:
        model = build(**overrides)
        calls = Calls(model)
        microbatches = [random_routes(model, seed) for seed in (11, 12)]
        with r3patch.replay(model, microbatches):
            losses = [loss_of(model, seed) for seed in (1, 2)]
            for loss in reversed(losses):
                loss.backward()
        for layer, maps in calls.main(in_backward=False).items():
            want = torch.cat([wanted_map(routes, layer) for routes in microbatches])
            assert torch.equal(torch.cat(maps), want)
        return gradients(model)

    assert_close(run(mlp_chunks_for_training=5, **recompute), run())


@pytest.mark.feature("config:mlp_chunks_for_training")
@RECOMPUTE
def test_chunked_mlp_with_rows_without_routes(recompute: Any) -> None:
    """The rows in which Megatron chooses are those of the whole microbatch, piece by piece."""

    def run(**overrides: Any) -> list[torch.Tensor]:
        model = build(**overrides)
        calls = Calls(model)
        with r3patch.replay(model, [with_gaps(random_routes(model, 11))]):
            loss_of(model, 1).backward()
        return [torch.cat(maps) for maps in calls.main(in_backward=False).values()]

    for got, want in zip(run(mlp_chunks_for_training=5, **recompute), run(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.feature("config:mlp_chunks_for_training")
def test_chunked_mlp_is_recorded_whole() -> None:
    """Recording a chunked MLP gives one Routes per microbatch, as without chunks."""
    recorded = []
    for chunks in (1, 3):
        model = build(mlp_chunks_for_training=chunks)
        with r3patch.record(model) as recording:
            step(model)
        recorded.append(recording.routes)
    assert recorded[0] == recorded[1]


# Rows without routes


@ROUTING
@RECOMPUTE
def test_missing_rows_route_live(recompute: Any, routing: Any) -> None:
    """Invalid rows take Megatron's own choice, valid ones the rollout's, in recompute too."""
    check_live_rows(recompute, routing)


@RECOMPUTE
def test_missing_rows_of_groups_without_megatrons_function(
    recompute: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where group_limited_topk cannot be had for some rows, it is asked for all of them."""
    from r3patch.sessions import _tap

    monkeypatch.setattr(_tap, "_group_limited_topk", lambda: None)
    groups = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
    check_live_rows(recompute, {"moe_router_score_function": "sigmoid", **groups})


def check_live_rows(recompute: Any, routing: Any) -> None:
    model = build(**recompute, **routing)
    routes = with_gaps(random_routes(model, 11))
    valid = routes.mask[:, 0]
    calls = Calls(model)
    with r3patch.replay(model, [routes]):
        step(model, (1,))
    first = routes.layers[0]
    live_model = build(**routing)
    live_calls = Calls(live_model)
    step(live_model, (1,))
    (live,) = live_calls.main(in_backward=False)[first]  # the first MoE layer: equal inputs
    for in_backward in {False, bool(recompute)}:
        (got,) = calls.main(in_backward=in_backward)[first]
        assert torch.equal(got[valid], wanted_map(routes, first)[valid])
        assert torch.equal(got[~valid], live[~valid])


def test_live_rows_are_frozen_for_recompute() -> None:
    """A near-tie that flips between forward and recompute does not change a live row."""
    model = build(**FULL)
    routes = with_gaps(random_routes(model, 11))
    calls = Calls(model)
    with r3patch.replay(model, [routes]):
        loss = loss_of(model, 1)
        with torch.no_grad():
            for info in r3patch.routers(model, "main"):
                info.module.weight.mul_(-1)  # any live choice is another one now
        loss.backward()
    for layer in routes.layers:
        (forward,) = calls.main(in_backward=False)[layer]
        (recompute,) = calls.main(in_backward=True)[layer]
        assert torch.equal(forward, recompute)


def test_spread_rows_are_distinct_and_balanced() -> None:
    """missing="spread" gives each row distinct experts and no expert more than one row above."""
    model = build()
    routes = Routes.missing(TOKENS, layers(model), TOPK, EXPERTS)
    calls = Calls(model)
    with r3patch.replay(model, [routes], missing="spread") as session:
        step(model, (1,))
    total = session.stats.total("main")
    assert (total.rows_spread, total.rows_live) == (len(routes.layers) * TOKENS, 0)
    for (routing_map,) in calls.main(in_backward=False).values():
        assert (routing_map.sum(1) == TOPK).all()
        load = routing_map.sum(0)
        assert load.max() - load.min() <= 1


def test_a_missing_sample_trains_as_without_replay() -> None:
    """A microbatch without a single valid row is Megatron's own step, to the bit."""
    model = build()
    plain = step(model, (1,))
    routes = Routes.missing(TOKENS, layers(model), TOPK, EXPERTS)
    with r3patch.replay(model, [routes]):
        assert_equal(step(model, (1,)), plain)
