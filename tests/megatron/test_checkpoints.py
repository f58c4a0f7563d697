"""Exact or refused: every kind of checkpoint x rows without routes x measure x a fault.

The oracle is the same run without any checkpoint and without a fault: gradients, and the maps that
hooks of our own have seen.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import (
    FULL,
    SELECTIVE,
    TOKENS,
    Calls,
    assert_close,
    build,
    gradients,
    layers,
    loss_of,
    random_routes,
    wanted_map,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import r3patch
from r3patch import Routes

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("cpu")]

GAPS = {
    "no": slice(0, 0),
    "last": slice(TOKENS - 1, TOKENS),
    "half": slice(0, None, 2),
    "every": slice(0, None),
}
PRODUCTS = [("no", True), ("last", False), ("last", True), ("half", False), ("every", True)]
#: Operations that Megatron's router and a tap both use: a selective checkpoint that saves them
#: hands a tap's results to Megatron if the two runs differ.
SAVED = {"topk", "sort", "gather", "index_select", "scatter", "_to_copy", "zeros", "sum", "copy_"}


def save_what_taps_use(context: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
    """A policy of selective checkpoints."""
    del context, args, kwargs
    name = operation.overloadpacket.__name__
    return CheckpointPolicy.MUST_SAVE if name in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def reentrant(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The reentrant checkpoint of torch takes no keyword arguments."""

    def positional(*values: Any) -> Any:
        return run(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))

    return checkpoint(positional, *args, *kwargs.values(), use_reentrant=True)


REENTRANT = reentrant
NON_REENTRANT = functools.partial(checkpoint, use_reentrant=False)
NO_EARLY_STOP = functools.partial(checkpoint, use_reentrant=False, early_stop=False)
SELECTING = functools.partial(
    checkpoint,
    use_reentrant=False,
    context_fn=lambda: create_selective_checkpoint_contexts(save_what_taps_use),
)

#: What runs the MoE part of a layer, what runs the layer around it, and Megatron's own settings.
Run = Callable[..., Any] | None
KINDS: dict[str, tuple[Run, Run, dict[str, Any]]] = {
    "reentrant": (REENTRANT, None, {}),
    "non_reentrant": (NON_REENTRANT, None, {}),
    "no_early_stop": (NO_EARLY_STOP, None, {}),
    "selecting": (SELECTING, None, {}),
    "selecting_all": (None, SELECTING, {}),
    "reentrant_in_non_reentrant": (REENTRANT, NON_REENTRANT, {}),
    "non_reentrant_in_reentrant": (NON_REENTRANT, REENTRANT, {}),
    "reentrant_in_reentrant": (REENTRANT, REENTRANT, {}),
    "non_reentrant_in_non_reentrant": (NON_REENTRANT, NON_REENTRANT, {}),
    "full": (None, None, FULL),
    "selective": (None, None, SELECTIVE),
    "non_reentrant_in_full": (NON_REENTRANT, None, FULL),
    "full_in_non_reentrant": (None, NON_REENTRANT, SELECTIVE),
}


def model_of(kind: str) -> Any:
    inner, outer, settings = KINDS[kind] if kind else (None, None, {})
    model = build(num_layers=2, **settings)
    for layer in model.decoder.layers:
        for module, run in ((layer.mlp, inner), (layer, outer)):
            if run is not None:
                module.forward = functools.partial(run, module.forward)
    return model


def microbatches(model: Any, gaps: slice) -> list[Routes]:
    routes = []
    for seed in (11, 12):
        whole = random_routes(model, seed)
        valid = torch.ones(TOKENS, dtype=torch.bool)
        valid[gaps] = False
        routes.append(Routes(whole.experts, whole.layers, valid, num_experts=whole.num_experts))
    return routes


class StopHereError(Exception):
    """Raised in the middle of a pass."""


def raising(*_: object) -> None:
    raise StopHereError


def no_fault(model: Any) -> dict[str, torch.Tensor]:
    """Two forwards, then their backwards, the first one first."""
    losses = [loss_of(model, seed) for seed in (1, 2)]
    for loss in losses:
        loss.backward()
    return gradients(model)


def failing_forward(model: Any) -> dict[str, torch.Tensor]:
    """A forward ends in the middle, behind the first layer's router, and is tried again."""
    router = r3patch.routers(model, "main")[-1].module
    handle = router.register_forward_pre_hook(raising)
    for _ in range(2):
        with pytest.raises(StopHereError):
            loss_of(model, 1)
    handle.remove()
    return no_fault(model)


def failing_backward(model: Any) -> dict[str, torch.Tensor]:
    """A backward ends in the middle of a recompute; another forward's goes on, then a step."""
    first, second = loss_of(model, 1), loss_of(model, 2)
    router = r3patch.routers(model, "main")[-1].module
    handle = router.weight.register_hook(raising)
    with pytest.raises(StopHereError):
        first.backward()
    handle.remove()
    model.zero_grad()
    second.backward()
    return gradients(model)


def outputs(model: Any) -> list[torch.Tensor]:
    """The decoder's outputs of two forwards: Megatron's loss has a backward that runs once only."""
    kept: list[torch.Tensor] = []
    handle = model.decoder.register_forward_hook(lambda _, args, output: kept.append(output))
    for seed in (1, 2):
        loss_of(model, seed)
    handle.remove()
    return [output.square().sum() for output in kept]


def twice(model: Any) -> dict[str, torch.Tensor]:
    """One of two graphs is kept for a second backward."""
    first, second = outputs(model)
    first.backward(retain_graph=True)
    second.backward()
    model.zero_grad()
    first.backward()
    return gradients(model)


def retried_backward(model: Any) -> dict[str, torch.Tensor]:
    """A kept graph's backward fails, another one's goes on, then it is tried again."""
    first, second = outputs(model)
    router = r3patch.routers(model, "main")[-1].module
    handle = router.weight.register_hook(raising)
    with pytest.raises(StopHereError):
        first.backward(retain_graph=True)
    handle.remove()
    second.backward()
    model.zero_grad()
    first.backward()
    return gradients(model)


@pytest.mark.parametrize(
    "run",
    [no_fault, failing_forward, failing_backward, twice, retried_backward],
    ids=lambda run: run.__name__,
)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_run_without_checkpoints(kind: str, run: Any) -> None:
    """Whatever rows have no routes, measured or not: gradients and the maps of every pass."""
    without = {failing_forward: no_fault, retried_backward: twice}.get(run, run)
    if kind.startswith("selecting") and run in (twice, retried_backward):
        return  # torch itself: "You are only allowed to backward once"
    for gaps, measure in PRODUCTS:
        got, calls, routes = result(kind, run, gaps, measure)
        assert_close(got, without_checkpoints(without, gaps, measure))
        for maps in (calls.main(in_backward=False), calls.main(in_backward=True)):
            for layer, seen in maps.items():
                fed = [wanted_map(one, layer) for one in routes]
                rows = routes[0].mask[:, 0]
                for got_map in seen:
                    assert any(torch.equal(got_map[rows], one[rows]) for one in fed), gaps


@functools.cache
def without_checkpoints(run: Any, gaps: str, measure: bool) -> dict[str, torch.Tensor]:
    """The oracle; kept, because every kind is held against it."""
    got: dict[str, torch.Tensor] = result("", run, gaps, measure)[0]
    return got


def result(kind: str, run: Any, gaps: str, measure: bool) -> Any:
    model = model_of(kind)
    routes = microbatches(model, GAPS[gaps])
    calls = Calls(model)
    with r3patch.replay(model, routes, measure=measure):
        got = run(model)
    return got, calls, routes


@pytest.mark.parametrize("kind", ["reentrant", "reentrant_in_reentrant", "non_reentrant", "full"])
def test_every_pass_in_a_thread_of_its_own(kind: str) -> None:
    """Each thread numbers its nodes from 0: the owner of a region is the same object anyway."""

    def in_thread(call: Callable[[], Any]) -> Any:
        results = []
        thread = threading.Thread(target=lambda: results.append(call()))
        thread.start()
        thread.join()
        return results[0]

    def run(model: Any) -> dict[str, torch.Tensor]:
        losses = [in_thread(functools.partial(loss_of, model, seed)) for seed in (1, 2)]
        for loss in reversed(losses):
            in_thread(loss.backward)
        return gradients(model)

    want = without_checkpoints(no_fault, "last", False)
    assert_close(result(kind, run, "last", False)[0], want)


@pytest.mark.parametrize("kind", ["", "reentrant", "non_reentrant", "full"])
def test_a_forward_inside_a_backward_hook_is_refused(kind: str) -> None:
    """It is no recompute, and rows that it took would be missing later."""
    model = model_of(kind)
    router = r3patch.routers(model, "main")[-1].module
    session = r3patch.replay(model, [random_routes(model, 11), random_routes(model, 12)])
    with session:
        loss = loss_of(model, 1)
        handle = router.weight.register_hook(lambda grad: loss_of(model, 2) and None)
        with pytest.raises(r3patch.ReplayError, match="inside backward"):
            loss.backward()
        handle.remove()
        loss_of(model, 2)  # its rows are still there


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind])
def test_a_backward_after_the_session_is_refused(kind: str) -> None:
    """Also from the output of an inner module, which no hook of the model has seen."""
    model = model_of(kind)
    kept = []
    model.decoder.register_forward_hook(lambda module, args, output: kept.append(output))
    with r3patch.replay(model, [random_routes(model, 11)]):
        loss_of(model, 1)
    with pytest.raises(r3patch.ReplayError, match="after its replay session"):
        kept[0].sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_from_a_kept_intermediate(kind: str) -> None:
    """The model's output is dropped, a part of its graph is not: its recompute finds its rows."""

    def run(model: Any) -> dict[str, torch.Tensor]:
        for loss in outputs(model):
            loss.backward()
        return gradients(model)

    want = without_checkpoints(run, "last", False)
    assert_close(result(kind, run, "last", False)[0], want)


def test_own_choice_in_gaps_is_frozen() -> None:
    """A near-tie that flips between forward and recompute does not move a row without routes."""
    model = model_of("non_reentrant")
    assert layers(model)
    calls = Calls(model)
    with r3patch.replay(model, microbatches(model, GAPS["every"])):
        losses = [loss_of(model, seed) for seed in (1, 2)]
        with torch.no_grad():
            for info in r3patch.routers(model, "main"):
                info.module.weight.add_(torch.randn_like(info.module.weight))
        for loss in losses:
            loss.backward()
    forward, again = calls.main(in_backward=False), calls.main(in_backward=True)
    assert again
    for layer, maps in again.items():
        for got, want in zip(maps, forward[layer], strict=True):
            assert torch.equal(got, want)
