"""Routes that no model would choose, in a whole model with MTP on the card."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from card import DTYPES, build, forced

import r3patch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("megatron", "repeatable")]

DTYPE = pytest.mark.parametrize("dtype", DTYPES)
RECOMPUTE = pytest.mark.parametrize(
    "recompute", [{}, tiny.FULL, tiny.SELECTIVE], ids=["no_recompute", "full", "selective_moe"]
)


@DTYPE
@RECOMPUTE
@tiny.ROUTING
@pytest.mark.parametrize("measure", [False, True])
def test_foreign_rows_reach_main_routers_and_none_of_mtp(
    dtype: str, recompute: Any, routing: Any, measure: bool
) -> None:
    """Forward and recompute take the rollout's rows; MTP is stock on the same input, to the bit."""
    model = build(**DTYPES[dtype], **recompute, **routing)
    microbatches = [tiny.random_routes(model, seed) for seed in (11, 12)]
    calls = tiny.Calls(model)
    with r3patch.replay(model, microbatches, measure=measure):
        tiny.step(model)
    seen = list(calls)
    tiny.assert_maps(calls.main(in_backward=False), microbatches)
    if recompute:
        tiny.assert_maps(calls.main(in_backward=True), microbatches)
    mtp = [call for call in seen if call.info.scope == "mtp"]
    assert len(mtp) >= 2
    for call in mtp:
        with torch.set_grad_enabled(call.grad_enabled):
            probs, routing_map = call.info.module(call.input)
        assert torch.equal(probs, call.probs)
        assert torch.equal(routing_map, call.routing_map)


@DTYPE
@pytest.mark.parametrize(
    ("routing", "native"),
    [
        # Where the order of a row's ids means nothing, Megatron's own replay gives these bits.
        ({"moe_router_score_function": "softmax", "moe_router_pre_softmax": True}, True),
        ({"moe_router_score_function": "sigmoid"}, False),
        ({"moe_router_score_function": "softmax"}, False),
    ],
    ids=["pre_softmax_native", "sigmoid", "softmax"],
)
@RECOMPUTE
def test_foreign_rows_give_the_bits_of_the_same_rows_forced(
    dtype: str, routing: Any, native: bool, recompute: Any
) -> None:
    """Losses and gradients are those of Megatron's RouterReplay, or of scores lifted over others.

    The forced run is without recompute. Under it Megatron 0.18 and newer do not sort a row in the
    pass without grad, and a session leaves it as given: another order of a sum, equal to rounding.
    """
    routing = {"moe_router_enable_expert_bias": False, **routing}
    model, twin = build(**DTYPES[dtype], **recompute, **routing), build(**DTYPES[dtype], **routing)
    routes = tiny.random_routes(model, 11)
    with r3patch.replay(model, [routes]):
        got = tiny.step(model, (1,))
    with forced(twin, routes, native=native):
        want = tiny.step(twin, (1,))
    if recompute and not native:
        tiny.assert_close(got, want)
    else:
        tiny.assert_equal(got, want)
