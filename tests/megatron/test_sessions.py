"""Record and replay on stock Megatron: routing maps, losses and gradients, not our counters."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import r3patch
from r3patch import Routes, testing

pytestmark = pytest.mark.megatron

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
RECOMPUTE = pytest.mark.parametrize(
    "recompute", [{}, FULL, SELECTIVE], ids=["no_recompute", "full", "selective_moe"]
)
ROUTING = pytest.mark.parametrize(
    "routing",
    [
        {"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False},
        {
            "moe_router_score_function": "softmax",
            "moe_router_enable_expert_bias": False,
            "moe_router_pre_softmax": True,
        },
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": False},
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
        {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
        },
    ],
    ids=["softmax", "pre_softmax", "sigmoid", "expert_bias", "group_limited"],
)

BATCH, LENGTH = 2, 12
TOKENS = BATCH * LENGTH
EXPERTS, TOPK = 16, 4


@pytest.fixture(scope="module", autouse=True)
def cpu() -> Iterator[None]:
    with testing.megatron_on_cpu():
        yield


def build(**overrides: Any) -> torch.nn.Module:
    """A small MoE + MTP model; the expert bias is filled, so that it matters."""
    torch.manual_seed(0)
    config = {"num_layers": 3, "num_moe_experts": EXPERTS, **overrides}
    (model,) = testing.tiny_model(**config)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.uniform_(-0.05, 0.05, generator=torch.Generator().manual_seed(1))
    return model.train()


def batch(seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(64, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    return {
        "input_ids": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "position_ids": torch.arange(LENGTH).expand(BATCH, LENGTH),
        "attention_mask": torch.triu(torch.ones(1, 1, LENGTH, LENGTH), 1).bool(),
    }


def layers(model: torch.nn.Module) -> tuple[int, ...]:
    return tuple(info.layer_number for info in r3patch.routers(model, "main"))


def random_routes(model: torch.nn.Module, seed: int, num_tokens: int = TOKENS) -> Routes:
    """Routes that the model would not choose: distinct random experts per row."""
    noise = torch.rand(
        num_tokens, len(layers(model)), EXPERTS, generator=torch.Generator().manual_seed(seed)
    )
    return Routes(noise.topk(TOPK).indices, layers(model), num_experts=EXPERTS)


def shuffled(routes: Routes) -> Routes:
    """The same sets, the ids of each row in another order."""
    order = torch.randperm(routes.topk, generator=torch.Generator().manual_seed(3))
    return Routes(routes.experts[..., order], routes.layers, num_experts=routes.num_experts)


def loss_of(model: torch.nn.Module, seed: int) -> torch.Tensor:
    return model(**batch(seed)).mean()


def step(model: torch.nn.Module, seeds: tuple[int, ...] = (1, 2)) -> dict[str, torch.Tensor]:
    """One step, a backward after each forward: losses and gradients by name."""
    model.zero_grad()
    result = {}
    for seed in seeds:
        loss = loss_of(model, seed)
        loss.backward()
        result[f"loss {seed}"] = loss.detach()
    return result | gradients(model)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert not different


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6, msg=name)


class Calls(testing.RoutingCalls):
    """Every routing call; the maps of main routers by layer number."""

    def main(self, *, in_backward: bool) -> dict[int, list[torch.Tensor]]:
        maps: dict[int, list[torch.Tensor]] = {}
        for call in self:
            if call.info.scope == "main" and call.in_backward == in_backward:
                maps.setdefault(call.info.layer_number, []).append(call.routing_map)
        return maps


def wanted_map(routes: Routes, layer: int) -> torch.Tensor:
    ids = routes.select((layer,)).experts[:, 0].long()
    return torch.zeros(len(ids), routes.num_experts, dtype=torch.bool).scatter(1, ids, True)


def assert_maps(maps: dict[int, list[torch.Tensor]], microbatches: list[Routes]) -> None:
    for layer in microbatches[0].layers:
        assert len(maps[layer]) == len(microbatches)
        for got, routes in zip(maps[layer], microbatches, strict=True):
            assert torch.equal(got, wanted_map(routes, layer))


# What the model would choose, replayed


@RECOMPUTE
@ROUTING
def test_own_routes_measured_are_equal_to_the_bit(routing, recompute) -> None:
    """Record, shuffle the columns, replay with measure=True: loss and all gradients are equal."""
    model = build(**routing, **recompute)
    plain = step(model)
    with r3patch.record(model) as recording:
        assert_equal(step(model), plain)
    with r3patch.replay(model, map(shuffled, recording.routes), measure=True) as session:
        assert_equal(step(model), plain)
    assert session.stats.total("main").mismatch == 0
    assert session.stats.token_mismatch == 0


@RECOMPUTE
@ROUTING
def test_own_routes_unmeasured(routing, recompute) -> None:
    """With measure=False equal to the bit without recompute, to fp32 rounding with it."""
    model = build(**routing, **recompute)
    plain = step(model)
    with r3patch.record(model) as recording:
        step(model)
    with r3patch.replay(model, map(shuffled, recording.routes), measure=False):
        replayed = step(model)
    (assert_close if recompute else assert_equal)(replayed, plain)


# Foreign routes


class Forced:
    """An independent way to force experts: scores of chosen experts are lifted over all others."""

    def __init__(self, microbatches: list[torch.Tensor]) -> None:
        self.microbatches = list(microbatches)

    def get_replay_topk(self, scores, topk, num_groups, group_topk, default_compute_topk):
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen.scatter_(1, self.microbatches.pop(0).long(), True)
        _, ids = torch.topk(scores.masked_fill(~chosen, -torch.inf), topk, dim=1)
        return scores.gather(1, ids), ids


@ROUTING
def test_foreign_routes_equal_an_independent_way_to_force_them(routing) -> None:
    """Loss and gradients are those of the same selection forced by masking the scores."""
    model = build(**routing)
    microbatches = [random_routes(model, seed) for seed in (11, 12)]
    infos = r3patch.routers(model, "main")
    for info in infos:
        info.module.router_replay = Forced(
            [r.select((info.layer_number,)).experts[:, 0] for r in microbatches]
        )
    forced = step(model)
    for info in infos:
        info.module.router_replay = None
    with r3patch.replay(model, microbatches):
        assert_close(step(model), forced)


@RECOMPUTE
def test_routing_maps_are_what_was_fed(recompute) -> None:
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
def test_mtp_is_megatrons_own_to_the_bit(recompute) -> None:
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


# Recompute in any order


def orders(model: torch.nn.Module, schedule: str) -> None:
    """Runs three microbatches (seeds 1, 2, 3) by a schedule of forwards f, backwards b, evals e."""
    losses: dict[int, torch.Tensor] = {}
    for move in schedule.split():
        seed = int(move[1])
        if move[0] == "f":
            losses[seed] = loss_of(model, seed)
        elif move[0] == "b":
            losses[seed].backward()
        else:
            with torch.no_grad():
                loss_of(model, seed)


@pytest.mark.parametrize("recompute", [FULL, SELECTIVE], ids=["full", "selective_moe"])
@pytest.mark.parametrize(
    "schedule",
    [
        "f1 f2 f3 b1 b2 b3",
        "f1 f2 f3 b3 b1 b2",
        "f1 f2 b1 f3 b2 b3",
        "f1 e4 f2 e5 b2 f3 e4 b1 e5 b3",
    ],
)
def test_recompute_in_any_order(recompute, schedule) -> None:
    """Whatever the order of forwards, backwards and evaluations, gradients are the plain run's."""

    def run(**overrides: Any) -> dict[str, torch.Tensor]:
        model = build(**overrides)
        seeds = [int(move[1]) for move in schedule.split() if move[0] in "fe"]
        with r3patch.replay(model, [random_routes(model, seed) for seed in seeds]):
            orders(model, schedule)
        return gradients(model)

    assert_close(run(**recompute), run())


@pytest.mark.parametrize("outer_reentrant", [True, False])
@pytest.mark.parametrize("recompute", [{}, FULL, SELECTIVE], ids=["plain", "full", "selective"])
def test_the_whole_model_in_a_checkpoint(recompute, outer_reentrant) -> None:
    """A checkpoint of the user's around Megatron's own nests, and gradients are the plain run's."""

    def run(wrap: bool, **overrides: Any) -> dict[str, torch.Tensor]:
        model = build(**overrides)
        microbatches = [random_routes(model, seed) for seed in (11, 12)]
        hook = torch.zeros((), requires_grad=True)
        with r3patch.replay(model, microbatches):
            losses = []
            for seed in (1, 2):

                def forward(_: torch.Tensor, seed: int = seed) -> torch.Tensor:
                    return loss_of(model, seed)

                losses.append(
                    checkpoint(forward, hook, use_reentrant=outer_reentrant)
                    if wrap
                    else forward(hook)
                )
            for loss in reversed(losses):
                loss.backward()
        return gradients(model)

    assert_close(run(True, **recompute), run(False))


@pytest.mark.parametrize("recompute", [FULL, SELECTIVE], ids=["full", "selective_moe"])
def test_backward_in_another_thread(recompute) -> None:
    """Autograd's CUDA workers are threads of their own: state on the tap is visible there."""
    model = build(**recompute)
    microbatches = [random_routes(model, 11)]
    with r3patch.replay(model, microbatches):
        loss = loss_of(model, 1)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    got, plain = gradients(model), build()
    with r3patch.replay(plain, microbatches):
        loss_of(plain, 1).backward()
    assert_close(got, gradients(plain))


@pytest.mark.feature("config:mlp_chunks_for_training")
@RECOMPUTE
def test_chunked_mlp(recompute) -> None:
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


def with_gaps(routes: Routes) -> Routes:
    valid = torch.arange(routes.num_tokens) % 3 != 0
    return Routes(routes.experts, routes.layers, valid, num_experts=routes.num_experts)


@RECOMPUTE
def test_missing_rows_route_live(recompute) -> None:
    """Invalid rows take Megatron's own choice, valid ones the rollout's, in recompute too."""
    model = build(**recompute)
    routes = with_gaps(random_routes(model, 11))
    valid = routes.valid[:, 0]
    calls = Calls(model)
    with r3patch.replay(model, [routes]):
        step(model, (1,))
    first = routes.layers[0]
    (live_model,) = (build(),)
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
    with r3patch.replay(model, [routes], missing="spread"):
        step(model, (1,))
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


# Bad use


def assert_untouched(model: torch.nn.Module) -> None:
    for info in r3patch.routers(model):
        assert info.module.router_replay is None
    assert not model._forward_hooks


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
def test_a_wrong_token_count_is_refused(num_tokens, text) -> None:
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
def test_routes_for_another_model_are_refused_on_entry(change, text) -> None:
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
        r3patch.replay(model, random_routes(model, 11))


@RECOMPUTE
def test_a_closed_session_holds_no_rows(recompute) -> None:
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


def vars_of(config: Any) -> dict[str, Any]:
    import dataclasses

    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
