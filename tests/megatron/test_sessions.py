"""Sessions used wrongly, and what they leave behind: everything is refused by name."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from tiny import (
    EXPERTS,
    FULL,
    RECOMPUTE,
    RECOMPUTES_MTP,
    TOKENS,
    TOPK,
    Calls,
    assert_equal,
    assert_maps,
    assert_untouched,
    build,
    gradients,
    loss_of,
    random_routes,
    step,
    with_gaps,
)

import r3patch
from r3patch import Routes

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("cpu")]


def test_nested_sessions_are_refused() -> None:
    """A second session on the same model raises, and the first goes on."""
    model = build()
    with r3patch.replay(model, [random_routes(model, 11)]):
        with (
            pytest.raises(r3patch.ReplayError, match="sessions on one model do not nest"),
            r3patch.record(model),
        ):
            pass
        step(model, (1,))
    assert_untouched(model)


def test_two_models_do_not_see_each_other() -> None:
    """A reference model beside the session routes live, to the bit."""
    model, reference = build(), build()
    plain = step(reference, (1,))
    with r3patch.replay(model, [random_routes(model, 11)]):
        assert_equal(step(reference, (1,)), plain)
        step(model, (1,))


def test_a_model_without_moe_is_refused() -> None:
    """There is nothing to replay in a dense model, and saying nothing would hide it."""
    model = build(num_moe_experts=None, moe_layer_freq=1)
    with pytest.raises(r3patch.UnsupportedRoutingError, match="no MoE router"):
        r3patch.replay(model).__enter__()


def test_unlabelled_routers_are_refused() -> None:
    """A model built before the import has no labels: the error says how to give them."""
    model = build()
    for info in r3patch.routers(model):
        del info.module.r3_scope
    with pytest.raises(r3patch.UnlabelledRouterError, match=r"r3patch\.label\(model\)"):
        r3patch.replay(model).__enter__()
    r3patch.label(model)
    with r3patch.replay(model, [random_routes(model, 11)]):
        step(model, (1,))


@pytest.mark.parametrize(
    ("num_tokens", "text"),
    [
        (2 * TOKENS, "2 times too many: with sequence parallelism"),
        (TOKENS // 2, "tokens are 2 times as many"),
        (TOKENS + 1, r"routes 24 tokens, the microbatch has 25 rows"),
    ],
)
def test_a_wrong_token_count_is_refused(num_tokens: int, text: str) -> None:
    """A call takes a whole microbatch; the message says what a factor of 2 means."""
    model = build()
    with (
        pytest.raises(r3patch.ReplayError, match=text),
        r3patch.replay(model, [random_routes(model, 11, num_tokens)]),
    ):
        step(model, (1,))
    assert_untouched(model)


def test_too_few_microbatches() -> None:
    """A forward without rows raises at once, naming the router and the number given."""
    model = build()
    with (
        pytest.raises(r3patch.ReplayError, match="forward call 2 has no rows: 1 microbatches"),
        r3patch.replay(model, [random_routes(model, 11)]),
    ):
        step(model, (1, 2))
    assert_untouched(model)


def test_too_many_microbatches() -> None:
    """Rows that no forward took raise on leaving, naming the router and both counts."""
    model = build()
    with (
        pytest.raises(r3patch.ReplayError, match=r"replayed 1 microbatches, 2 were given"),
        r3patch.replay(model, [random_routes(model, seed) for seed in (11, 12)]),
    ):
        step(model, (1,))
    assert_untouched(model)


def test_a_session_that_replays_nothing_raises() -> None:
    """An empty session is a no-op that somebody believes in."""
    model = build()
    with pytest.raises(r3patch.ReplayError, match="Nothing was replayed"), r3patch.replay(model):
        pass


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"topk": TOPK - 1}, "is top-3 of 16 experts"),
        ({"num_experts": EXPERTS * 2}, "is top-4 of 32 experts"),
        ({"layers": (1, 3)}, "has no column for .* \\(layer 2\\)"),
    ],
)
def test_routes_for_another_model_are_refused_on_entry(change: Any, text: str) -> None:
    """topk, number of experts and layers are compared before any forward."""
    model = build()
    routes = random_routes(model, 11)
    experts = routes.experts[..., : change.get("topk", TOPK)]
    wrong = Routes(
        experts,
        change.get("layers", routes.layers),
        num_experts=change.get("num_experts", EXPERTS),
    )
    with pytest.raises(r3patch.RoutesError, match=text):
        r3patch.replay(model, [wrong]).__enter__()
    assert_untouched(model)


def test_one_routes_is_not_a_list_of_microbatches() -> None:
    """A Routes in the place of a list is a mistake that iteration would hide."""
    model = build()
    with pytest.raises(r3patch.ReplayError, match="it takes a list, one for each microbatch"):
        r3patch.replay(model, random_routes(model, 11))  # type: ignore[arg-type]


@RECOMPUTE
def test_a_closed_session_holds_no_rows(recompute: Any) -> None:
    """The user may keep the session for its figures: rows and calls are freed."""
    model = build(**recompute)
    with r3patch.replay(model, [random_routes(model, seed) for seed in (11, 12)]) as session:
        step(model)
    gc.collect()
    kept = [o for o in gc.get_objects() if type(o).__name__ in ("Microbatch", "Rows", "DeviceRows")]
    assert not kept
    assert session.stats.total("main").rows_replayed > 0


def test_missing_error() -> None:
    """missing="error" refuses invalid rows on entry."""
    model = build()
    session = r3patch.replay(model, [with_gaps(random_routes(model, 11))], missing="error")
    with pytest.raises(r3patch.RoutesError, match="rows without routes"):
        session.__enter__()
    assert_untouched(model)


def test_sinkhorn_is_refused() -> None:
    """Routing that never asks Megatron's top-k is refused, with the router and the setting."""
    model = build(
        moe_router_load_balancing_type="sinkhorn",
        moe_aux_loss_coeff=0.0,
        moe_router_enable_expert_bias=False,
        moe_router_score_function="softmax",
    )
    with pytest.raises(
        r3patch.UnsupportedRoutingError, match=r"mlp\.router: moe_router_load_balancing_type"
    ):
        r3patch.replay(model).__enter__()
    assert_untouched(model)


@RECOMPUTES_MTP
def test_an_exception_in_the_middle_of_a_step() -> None:
    """The user's exception is the one that is seen, and every router is as it was."""
    model = build(**FULL)

    def interrupted() -> None:
        with r3patch.replay(model, [random_routes(model, seed) for seed in (11, 12)]):
            loss_of(model, 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert_untouched(model)
    plain = build(**FULL)
    assert_equal(step(model), step(plain))


@RECOMPUTES_MTP
def test_backward_after_the_session_is_refused_under_recompute() -> None:
    """Recompute after the session would route live in silence: it raises."""
    model = build(**FULL)
    with r3patch.replay(model, [random_routes(model, 11)]):
        loss = loss_of(model, 1)
    with pytest.raises(r3patch.ReplayError, match="backward runs after its replay session"):
        loss.backward()


def test_backward_after_the_session_without_recompute() -> None:
    """Without recompute a late backward is exact, so it is allowed."""
    model, other = build(), build()
    routes = [random_routes(model, 11)]
    with r3patch.replay(model, routes):
        loss = loss_of(model, 1)
    loss.backward()
    with r3patch.replay(other, routes):
        loss_of(other, 1).backward()
    assert_equal(gradients(model), gradients(other))


def test_a_router_that_never_reaches_the_top_k_is_named() -> None:
    """Somebody replaced routing: the session says so rather than replay in part."""
    model = build()
    (info, *_) = r3patch.routers(model, "main")
    routing = info.module.routing

    def without_replay(logits: torch.Tensor, **kwargs: Any) -> Any:
        tap, info.module.router_replay = info.module.router_replay, None
        try:
            return routing(logits, **kwargs)
        finally:
            info.module.router_replay = tap

    info.module.routing = without_replay
    with (
        pytest.raises(r3patch.ReplayError, match="replayed 0 microbatches, 1 were given"),
        r3patch.replay(model, [random_routes(model, 11)]),
    ):
        step(model, (1,))


def test_feed_from_inside() -> None:
    """feed() appends a microbatch; after the block it is refused."""
    model = build()
    calls = Calls(model)
    microbatches = [random_routes(model, seed) for seed in (11, 12)]
    with r3patch.replay(model) as session:
        for seed, routes in zip((1, 2), microbatches, strict=True):
            session.feed(routes, chunk=model)
            loss_of(model, seed).backward()
    assert_maps(calls.main(in_backward=False), microbatches)
    with pytest.raises(r3patch.ReplayError, match="inside the"):
        session.feed(microbatches[0])


def test_open_and_close_are_the_block() -> None:
    """Frameworks that have hooks but no block get the same checks and the same end."""
    model = build()
    session = r3patch.replay(model, [random_routes(model, 11)]).open()
    with pytest.raises(r3patch.ReplayError, match="replayed 0 microbatches, 1 were given"):
        session.close()
    assert_untouched(model)
    session = r3patch.replay(model, [random_routes(model, 11)]).open()
    session.close(ValueError("the step failed"))  # no second error over the first
    assert_untouched(model)


def test_a_session_is_entered_once() -> None:
    """A used session is not opened again with stale cursors."""
    model = build()
    session = r3patch.replay(model, [random_routes(model, 11)])
    with session:
        step(model, (1,))
    with pytest.raises(r3patch.ReplayError, match="entered before"), session:
        pass


def test_a_decoder_rebuilt_after_construction() -> None:
    """Routers are those of the live model: orphans of a rebuilt decoder swallow nothing."""
    model, donor = build(), build()
    model.decoder = donor.decoder
    calls = Calls(model)
    microbatches = [random_routes(model, 11)]
    with r3patch.replay(model, microbatches):
        step(model, (1,))
    assert_maps(calls.main(in_backward=False), microbatches)


def test_fusion_is_off_for_the_session_only() -> None:
    """Main routers see a config without fusion; the model's own config is not changed."""
    model = build()
    model.config.moe_router_fusion = True  # the fused kernel itself needs Transformer Engine
    (mtp,) = r3patch.routers(model, "mtp")
    mtp.module.config = type(model.config)(**{**vars_of(model.config), "moe_router_fusion": False})
    mtp_config = mtp.module.config
    with r3patch.replay(model, [random_routes(model, 11)]):
        step(model, (1,))
        assert model.config.moe_router_fusion
        assert mtp.module.config is mtp_config
    for info in r3patch.routers(model, "main"):
        assert info.module.config is model.config


def test_routers_that_are_left_alone_keep_the_fused_kernel() -> None:
    """An MTP router's bits in a session are those outside of it."""
    model = build()
    model.config.moe_router_fusion = True
    session = r3patch.replay(model, []).open()
    fused = {i.scope: i.module.config.moe_router_fusion for i in r3patch.routers(model)}
    assert fused == {"main": False, "mtp": True}
    session.close(StopIteration())


def vars_of(config: Any) -> dict[str, Any]:
    import dataclasses

    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
