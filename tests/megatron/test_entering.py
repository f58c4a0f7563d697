"""Entering and leaving a session, by every way there is; and what a session keeps meanwhile."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import (
    EXPERTS,
    FULL,
    RECOMPUTE,
    TOKENS,
    TOPK,
    Calls,
    assert_untouched,
    build,
    layers,
    loss_of,
    random_routes,
    step,
    with_gaps,
)

import r3patch
from r3patch import Routes
from r3patch.sessions import _preflight, _session
from r3patch.sessions._passes import ForwardPasses

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("cpu")]


# Forgotten sessions


@pytest.mark.parametrize("open_session", [r3patch.record, r3patch.replay])
def test_a_session_that_is_never_entered_says_so(open_session: Any, caplog: Any) -> None:
    """`r3patch.replay(model, rows)` without `with` would route live in silence."""
    model = build()
    with pytest.warns(ResourceWarning, match="was never entered: routers ran live"):
        open_session(model)  # collected at once
    (record,) = [r for r in caplog.records if "never entered" in r.message]
    assert record.levelno == logging.WARNING


def test_a_lost_session_restores_its_routers(caplog: Any) -> None:
    """Entered by hand and dropped: the taps go with the session, and the log says so."""
    model = build()
    with pytest.warns(ResourceWarning, match="was open and nobody held it"):
        r3patch.replay(model, [random_routes(model, 11)]).__enter__()
    assert_untouched(model)
    assert "its routers are restored" in caplog.text


def test_sessions_that_are_left_say_nothing() -> None:
    """By a clean exit, by an exception, or refused on entry: there is nothing to warn of."""
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        with r3patch.replay(model, [random_routes(model, 11)]):
            loss_of(model, 1)
        with pytest.raises(ZeroDivisionError), r3patch.record(model):
            1 / 0  # noqa: B018
        with pytest.raises(r3patch.RoutesError):
            r3patch.replay(model, [Routes.missing(TOKENS, [9], TOPK, EXPERTS)]).__enter__()
        gc.collect()


# One lock, and no interrupt between


def test_two_threads_enter_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """One gets in, the other is refused; afterwards no tap is left."""
    # The last of the checks, slowed down: the other thread is in the middle of entering, too.
    monkeypatch.setattr(_preflight, "require_moe", lambda *_: time.sleep(0.01))
    model = build()
    for _ in range(20):
        meet = threading.Barrier(2, timeout=60)
        outcomes: list[str] = []

        def enter(meet: threading.Barrier = meet, outcomes: list[str] = outcomes) -> None:
            session = r3patch.replay(model, [])
            meet.wait()
            try:
                session.__enter__()
            except r3patch.ReplayError:
                outcomes.append("refused")
            else:
                outcomes.append("in")
            meet.wait()
            if outcomes.count("in") and session._lifetime.open:
                session.__exit__(ValueError, ValueError(), None)

        threads = [threading.Thread(target=enter) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["in", "refused"]
        assert_untouched(model)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_entry_that_fails_half_way_is_taken_back(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and not when the session is collected: somebody may hold it."""
    model = build()
    session = r3patch.replay(model, [random_routes(model, 11)])

    watch = ForwardPasses.watch

    def fail(passes: Any, chunk: Any) -> None:
        watch(passes, chunk)
        raise error

    monkeypatch.setattr(ForwardPasses, "watch", fail)
    with pytest.raises(error):
        session.open()
    assert_untouched(model)


def test_an_interrupt_on_leaving_stops_nothing() -> None:
    """What is left to take back is taken back; then the interrupt goes on its way."""
    lifetime, done = _session.Lifetime("replay"), []

    def interrupt_once() -> None:
        done.append("second")
        if done.count("second") == 1:
            raise KeyboardInterrupt

    lifetime.undo(lambda: done.append("first"))
    lifetime.undo(interrupt_once)
    lifetime.undo(lambda: done.append("third"))
    with pytest.raises(KeyboardInterrupt):
        lifetime.close()
    assert done == ["third", "second", "second", "first"]


def interrupted_at(number: int, call: Callable[[], None]) -> bool:
    """Run `call` with a KeyboardInterrupt at its n-th line in r3patch; whether it came so far."""
    count = itertools.count()
    reached = False

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal reached
        if "r3patch/sessions" not in frame.f_code.co_filename:
            return None
        if event == "line" and next(count) == number:
            reached = True
            raise KeyboardInterrupt
        return trace

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(old)
    return reached


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["record", "replay"])
def test_an_interrupt_at_any_line_leaves_the_routers_clean(kind: str) -> None:
    """Ctrl-C in entry and exit: every router and every hook of the model is as before."""
    model = build(num_layers=2)
    routes = random_routes(model, 11)

    def run() -> None:
        session = r3patch.record(model) if kind == "record" else r3patch.replay(model, [routes])
        with session:
            raise KeyboardInterrupt

    number = 0
    while interrupted_at(number, run):
        gc.collect()
        assert_untouched(model)
        for module in model.modules():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            assert not [hook for hook in hooks if "r3patch" in type(hook).__module__]
            assert not [hook for hook in hooks if hasattr(hook, "__self__")], number
        number += 1 if number < 40 else 7
    assert number > 100
    assert model.decoder  # the model is whole


# Rows are the session's own


@pytest.mark.parametrize("missing", ["live", "spread"])
@pytest.mark.parametrize("num_layers", [2, 3])
def test_rows_are_not_the_callers(num_layers: int, missing: Any) -> None:
    """Spreading writes nothing into the caller's routes, and changing them changes no replay."""
    model = build(num_layers=num_layers)  # the first is dense: with 2, one column
    given = with_gaps(random_routes(model, 11))
    before = given.experts.clone()
    calls = Calls(model)
    with r3patch.replay(model, [given], missing=missing):
        assert torch.equal(given.experts, before)
        given.experts.fill_(0)
        loss_of(model, 1)
    valid = given.mask[:, 0]
    want = Routes(before, given.layers, given.valid, num_experts=EXPERTS)
    for layer, (got,) in calls.main(in_backward=False).items():
        ids = want.select([layer]).experts[:, 0].long()
        wanted = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, ids, True)
        assert torch.equal(got[valid], wanted[valid])


# What a session keeps


def tensors_of_ours() -> int:
    """Bytes of the id tensors that are alive: narrow integers, which Megatron does not use."""
    found = {
        o.untyped_storage().data_ptr(): o.untyped_storage().nbytes()
        for o in gc.get_objects()
        if isinstance(o, torch.Tensor) and o.dtype in (torch.uint8, torch.int16)
    }
    return sum(found.values())


@pytest.mark.parametrize("measure", [False, True])
@RECOMPUTE
def test_memory_is_flat_in_the_number_of_microbatches(recompute: Any, measure: bool) -> None:
    """After its backward a microbatch leaves a byte or two per token if measured, else nothing."""
    model = build(**recompute)
    kept = []
    with r3patch.replay(model, [], measure=measure) as session:
        for seed in range(8):
            session.feed(with_gaps(random_routes(model, seed)))
            loss_of(model, seed).backward()
            model.zero_grad()
            gc.collect()
            kept.append(tensors_of_ours())
    growth = (kept[-1] - kept[3]) / 4
    assert growth <= (2 * TOKENS if measure else 0), kept


def test_a_scoring_pass_keeps_nothing() -> None:
    """No backward will ask for the rows of a no-grad pass, checkpointed or not."""
    model = build(**FULL)
    microbatches = [random_routes(model, seed) for seed in range(6)]
    kept = []
    with r3patch.replay(model, microbatches), torch.no_grad():
        for seed in range(6):
            loss_of(model, seed)
            gc.collect()
            kept.append(tensors_of_ours())
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < kept[0]


def test_a_session_does_not_keep_its_model() -> None:
    """Nor the other way round: what is dropped is collected."""
    model = build()
    with r3patch.replay(model, [random_routes(model, 11)]) as session:
        loss_of(model, 1)
    gone = weakref.ref(session)
    del session
    gc.collect()
    assert gone() is None


# Refused on entry, by name


def test_a_chunk_that_is_listed_twice() -> None:
    """Each of its passes would count twice."""
    model = build()
    with pytest.raises(r3patch.ReplayError, match=r"chunk 1 of the model .* is there before"):
        r3patch.replay([model, model], [random_routes(model, 11)]).__enter__()
    assert_untouched(model)


def test_a_router_that_two_chunks_share() -> None:
    """Which rows a call takes could not be known."""
    first, second = build(), build()
    second.decoder.layers[2] = first.decoder.layers[2]
    with pytest.raises(
        r3patch.ReplayError, match=r"layers\.2\.mlp\.router .* is a part of chunks \[0, 1\]"
    ):
        r3patch.replay([first, second], [random_routes(first, 11)]).__enter__()
    assert_untouched(first)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("moe_router_force_load_balancing", True), ("moe_router_force_biased", 1.0)],
)
@pytest.mark.parametrize("open_session", [r3patch.record, r3patch.replay])
def test_forced_balancing(open_session: Any, setting: str, value: Any) -> None:
    """Gate weights are noise there, whatever the ids are."""
    model = build()
    for info in r3patch.routers(model):
        setattr(info.module.config, setting, value)
    with pytest.raises(r3patch.UnsupportedRoutingError, match=f"{setting}={value}: logits are"):
        open_session(model).__enter__()


def test_layers_with_different_topk() -> None:
    """One clear refusal, not a shape error in the middle of a forward."""
    model = build()
    router = r3patch.routers(model, "main")[-1].module
    router.config = copy.copy(router.config)
    router.config.moe_router_topk = router.topk = 2
    with pytest.raises(r3patch.UnsupportedRoutingError, match="different topk cannot be replayed"):
        r3patch.replay(model, [random_routes(model, 11)]).__enter__()


# Pruned models


def pruned(experts: int = 8, **overrides: Any) -> Any:
    """The last layer has fewer experts than the model's config says."""
    model = build(**overrides)
    router = r3patch.routers(model, "main")[-1].module
    router.config = copy.copy(router.config)
    router.config.num_moe_experts = experts
    router.weight = torch.nn.Parameter(router.weight.detach()[:experts].clone())
    if router.expert_bias is not None:
        router.expert_bias = router.expert_bias[:experts]
        router.local_tokens_per_expert = router.local_tokens_per_expert[:experts]
    return model


def run_routers(model: Any) -> None:
    hidden = torch.randn(
        12, 2, model.config.hidden_size, generator=torch.Generator().manual_seed(3)
    )
    for info in r3patch.routers(model, "main"):
        info.module(hidden)


@pytest.mark.parametrize("measure", [False, True])
def test_a_pruned_layer_is_recorded_and_replayed(measure: bool) -> None:
    """Each layer with its own number of experts: what it recorded is what it routes again."""
    model = pruned()
    with r3patch.record(model) as recording:
        run_routers(model)
    (routes,) = recording.routes
    assert routes.num_experts == EXPERTS
    assert int(routes.select([layers(model)[-1]]).experts.max()) < 8
    calls = Calls(model)
    with r3patch.replay(model, [routes], measure=measure):
        run_routers(model)
    for layer, (got,) in calls.main(in_backward=False).items():
        ids = routes.select([layer]).experts[:, 0].long()
        assert torch.equal(got, torch.zeros_like(got).scatter(1, ids, True))


@pytest.mark.parametrize("config", ["its own", "the model's"])
def test_an_id_that_a_pruned_layer_does_not_have(config: str) -> None:
    """The routes of the whole model are refused on entry, with the layer and the id."""
    model = pruned()
    if config == "the model's":  # the rows of its gate tell
        r3patch.routers(model, "main")[-1].module.config = model.config
    with pytest.raises(r3patch.RoutesError, match=r"expert 1\d in layer 3, but .* has 8 experts"):
        r3patch.replay(model, [random_routes(model, 11)]).__enter__()


def test_the_figures_of_a_session_survive_it() -> None:
    """Rows go, figures stay: they are read after the block."""
    model = build()
    with r3patch.replay(
        model, [random_routes(model, 1), random_routes(model, 2)], measure=True
    ) as s:
        step(model)
    assert len(s.stats.tokens) == 2 * TOKENS
    assert s.stats.total("main").rows_measured == 2 * TOKENS * len(layers(model))
