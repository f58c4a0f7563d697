"""Replay on stock Megatron: routing maps, losses and gradients, not our counters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import (
    RECOMPUTE,
    ROUTING,
    TOKENS,
    Calls,
    assert_close,
    assert_equal,
    assert_maps,
    build,
    random_routes,
    shuffled,
    step,
    with_tokens,
)

import r3patch
from r3patch import Routes

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("cpu")]


# What the model would choose, replayed


@RECOMPUTE
@ROUTING
def test_own_routes_measured_are_equal_to_the_bit(routing: Any, recompute: Any) -> None:
    """Record, shuffle the columns, replay with measure=True: loss and all gradients are equal."""
    model = build(**routing, **recompute)
    plain = step(model)
    with r3patch.record(model) as recording:
        assert_equal(step(model), plain)
    rows = [with_tokens(shuffled(r), seed) for seed, r in enumerate(recording.routes, start=1)]
    with r3patch.replay(model, rows, measure=True, tokens="strict") as session:
        assert_equal(step(model), plain)
    assert session.stats.total("main").mismatch == 0
    assert session.stats.token_mismatch == 0
    assert session.stats.token_checks[0].checked == 2 * TOKENS


@RECOMPUTE
@ROUTING
def test_own_routes_unmeasured(routing: Any, recompute: Any) -> None:
    """With measure=False equal to the bit without recompute, to fp32 rounding with it."""
    model = build(**routing, **recompute)
    plain = step(model)
    with r3patch.record(model) as recording:
        step(model)
    rows = [with_tokens(shuffled(r), seed) for seed, r in enumerate(recording.routes, start=1)]
    with r3patch.replay(model, rows, measure=False, tokens="strict"):
        replayed = step(model)
    (assert_close if recompute else assert_equal)(replayed, plain)


@ROUTING
def test_two_ids_a_row_need_no_order(routing: Any) -> None:
    """Rows of two ids, turned round and left so: the sum of two has the same bits both ways."""
    model = build(moe_router_topk=2, **routing)
    plain = step(model)
    with r3patch.record(model) as recording:
        step(model)
    turned = [
        Routes(r.experts.flip(-1), r.layers, r.valid, num_experts=r.num_experts)
        for r in recording.routes
    ]
    with r3patch.replay(model, turned):
        assert_equal(step(model), plain)


# Foreign routes


class Forced:
    """An independent way to force experts: scores of chosen experts are lifted over all others."""

    def __init__(self, microbatches: list[torch.Tensor]) -> None:
        self.microbatches = list(microbatches)

    def get_replay_topk(
        self, scores: Any, topk: int, num_groups: Any, group_topk: Any, default_compute_topk: Any
    ) -> Any:
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen.scatter_(1, self.microbatches.pop(0).long(), True)
        _, ids = torch.topk(scores.masked_fill(~chosen, -torch.inf), topk, dim=1)
        return scores.gather(1, ids), ids


@ROUTING
def test_foreign_routes_equal_an_independent_way_to_force_them(routing: Any) -> None:
    """Loss and gradients are those of the same selection forced by masking the scores."""
    model = build(**routing)
    microbatches = [random_routes(model, seed) for seed in (11, 12)]
    infos = r3patch.routers(model, "main")
    for info in infos:
        info.module.router_replay = Forced(
            [r.select([info.layer_number or 0]).experts[:, 0] for r in microbatches]
        )
    forced = step(model)
    for info in infos:
        info.module.router_replay = None
    with r3patch.replay(model, microbatches):
        assert_close(step(model), forced)


@RECOMPUTE
def test_routing_maps_are_what_was_fed(recompute: Any) -> None:
    """Every main router's map is the fed row set, in forward and in recompute."""
    model = build(**recompute)
    calls = Calls(model)
    microbatches = [random_routes(model, seed) for seed in (11, 12)]
    with r3patch.replay(model, microbatches):
        step(model)
    assert_maps(calls.main(in_backward=False), microbatches)
    if recompute:
        assert_maps(calls.main(in_backward=True), microbatches)


@RECOMPUTE
def test_mtp_is_megatrons_own_to_the_bit(recompute: Any) -> None:
    """Every MTP call's probs and map equal those of Megatron's router on the same input."""
    model = build(**recompute)
    calls = Calls(model)
    with r3patch.replay(model, [random_routes(model, 11)]):
        step(model, (1,))
    (info,) = r3patch.routers(model, "mtp")
    seen = [call for call in calls if call.info.scope == "mtp"]
    assert seen
    for call in seen:
        with torch.set_grad_enabled(call.grad_enabled):
            own_probs, own_map = info.module(call.input)
        assert torch.equal(own_probs, call.probs)
        assert torch.equal(own_map, call.routing_map)


def test_gradients_reach_the_router() -> None:
    """Gate weights come from the live logits: main routers get gradients under replay."""
    model = build()
    with r3patch.replay(model, [random_routes(model, 11)]):
        step(model, (1,))
    for info in r3patch.routers(model, "main"):
        assert info.module.weight.grad.abs().sum() > 0


# The compiled path


def test_nothing_of_ours_is_on_the_forward_path() -> None:
    """Outside a session the routing functions are Megatron's own, no wrapt object in reach."""
    import wrapt
    from megatron.core.transformer.moe import moe_utils, router

    assert router.topk_routing_with_score_function is moe_utils.topk_routing_with_score_function
    for function in (
        router.TopKRouter.forward,
        router.TopKRouter.routing,
        moe_utils.topk_routing_with_score_function,
    ):
        assert not isinstance(function, wrapt.ObjectProxy)
        assert function.__module__.startswith("megatron.")
    for module in build().modules():
        names = [n for n in dir(type(module)) if n not in ("__init__", "__class__")]
        classes = type(module).__mro__
        held = [*vars(module).values(), *(vars(c).get(name) for c in classes for name in names)]
        assert not any(isinstance(value, wrapt.ObjectProxy) for value in held)
