"""CallLog: which forward call a recompute repeats, on plain torch."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from r3patch import ReplayError, UnsupportedMegatronError
from r3patch.sessions import _recompute
from r3patch.sessions._recompute import CallLog, in_backward, surroundings


@pytest.fixture(autouse=True, params=["torch tells its hooks", "torch 2.6 does not"])
def hooks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file twice: by autograd's stack of hooks, and by the Python stack."""
    tells = request.param == "torch tells its hooks"
    if tells and not _recompute.TELLS_HOOKS:
        pytest.skip("this torch does not")
    monkeypatch.setattr(_recompute, "TELLS_HOOKS", tells)


class Router(torch.nn.Module):
    """Notes the value of each forward call, and the value that each recompute gets back."""

    def __init__(self) -> None:
        super().__init__()
        self.log: CallLog[int] = CallLog()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.forwards = 0
        self.recomputed: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if in_backward():
            value = self.log.recompute("router", surroundings())
            self.recomputed.append(value)
        else:
            value = self.forwards
            self.log.forward(value, surroundings())
            self.forwards += 1
        # The tensor remembers which value it was made with: the gradient shows a wrong match.
        return (x * self.weight * (value + 1)).sin()


Run = Callable[[Callable[..., torch.Tensor], torch.Tensor], Any]


def leaf() -> torch.Tensor:
    return torch.full((2,), 0.1, requires_grad=True)


def reentrant(f: Callable[..., torch.Tensor], x: torch.Tensor) -> Any:
    return checkpoint(f, x, use_reentrant=True)


def non_reentrant(f: Callable[..., torch.Tensor], x: torch.Tensor) -> Any:
    return checkpoint(f, x, use_reentrant=False)


def plain(f: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return f(x)


BOTH = pytest.mark.parametrize("run", [reentrant, non_reentrant])
MIXED = pytest.mark.parametrize("outer", [reentrant, non_reentrant])


@BOTH
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_several_forwards_before_their_backwards(run: Run, order: tuple[int, ...]) -> None:
    """Whatever the order of the backwards, each recompute gets its own forward's value."""
    router = Router()
    losses = [run(router, leaf()).sum() for _ in range(3)]
    for index in order:
        losses[index].backward()
    assert router.recomputed == list(order)


@BOTH
def test_evaluation_passes_in_between(run: Run) -> None:
    """Evaluation passes before, between and after shift nothing."""
    router = Router()

    def evaluate() -> None:
        with torch.no_grad():
            router(leaf())

    evaluate()
    first = run(router, leaf()).sum()  # value 1
    evaluate()
    evaluate()
    second = run(router, leaf()).sum()  # value 4
    evaluate()
    second.backward()
    evaluate()
    first.backward()
    assert router.recomputed == [4, 1]


@BOTH
def test_chunks_of_one_region(run: Run) -> None:
    """Calls of one region, a chunked MLP, are repeated in their order."""
    router = Router()

    def chunked(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([router(piece) for piece in x.chunk(2)])

    losses = [run(chunked, leaf()).sum() for _ in range(2)]
    for loss in reversed(losses):
        loss.backward()
    assert router.recomputed == [2, 3, 0, 1]


@BOTH
def test_one_backward_over_several_regions(run: Run) -> None:
    """One backward through many regions repeats each with its own value, last region first."""
    router = Router()
    x = leaf()
    for _ in range(4):
        x = run(router, x)
    x.sum().backward()
    assert router.recomputed == [3, 2, 1, 0]


@MIXED
@BOTH
def test_nested_regions(outer: Run, run: Run) -> None:
    """A recompute inside a recompute gets the value of the forward call, not of a later one."""
    router = Router()

    def layers(x: torch.Tensor) -> Any:
        y: torch.Tensor = run(router, run(router, x))
        return y

    losses = [outer(layers, leaf()).sum() for _ in range(2)]
    for loss in reversed(losses):
        loss.backward()
    # An early stop may spare a call; none may come from the other microbatch.
    microbatches = [value // 2 for value in router.recomputed]
    assert microbatches == sorted(microbatches, reverse=True)
    assert set(router.recomputed) == {0, 1, 2, 3}


@MIXED
@BOTH
def test_nested_gradients_equal_the_plain_run(outer: Run, run: Run) -> None:
    """Nested checkpoints give the gradients of the run without any, so every value was right."""

    def gradients(outer: Run, run: Run) -> list[Any]:
        router, inputs = Router(), [leaf() for _ in range(3)]

        def layers(x: torch.Tensor) -> Any:
            return run(router, torch.cat([run(router, piece) for piece in x.chunk(2)]))

        losses = [outer(layers, x).sum() for x in inputs]
        for index in (1, 2, 0):
            losses[index].backward()
        return [x.grad for x in inputs] + [router.weight.grad]

    expected = gradients(plain, plain)
    for got, want in zip(gradients(outer, run), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@BOTH
def test_backward_in_another_thread(run: Run) -> None:
    """The log is state of an object: a backward in another thread finds it."""
    router = Router()
    losses = [run(router, leaf()).sum() for _ in range(2)]
    for loss in reversed(losses):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert router.recomputed == [1, 0]


@MIXED
@BOTH
def test_two_backwards_at_the_same_time(outer: Run, run: Run) -> None:
    """Recomputes that run side by side, held against each other at every call, take their own."""
    router = Router()
    meet = threading.Barrier(2, timeout=60)

    def layers(x: torch.Tensor) -> Any:
        if in_backward():
            meet.wait()
        return run(router, x).exp()

    inputs = [leaf() for _ in range(2)]
    threads = [threading.Thread(target=outer(layers, x).sum().backward) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = []
    for value in range(2):
        x = leaf()
        (x * (value + 1)).sin().exp().sum().backward()
        expected.append(x.grad)
    for x, want in zip(inputs, expected, strict=True):
        torch.testing.assert_close(x.grad, want)


@BOTH
def test_threads_of_their_own(run: Run) -> None:
    """Each thread numbers its nodes from 0: forwards and backwards in fresh threads match."""
    router, inputs = Router(), [leaf() for _ in range(3)]
    losses: list[torch.Tensor] = []

    def forward(x: torch.Tensor) -> None:
        losses.append(run(router, x).sum())

    def in_thread(call: Callable[[], object]) -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    for x in inputs:
        in_thread(functools.partial(forward, x))
    for index in (1, 0, 2):
        in_thread(losses[index].backward)
    assert router.recomputed == [1, 0, 2]


@MIXED
@BOTH
def test_a_failed_backward_and_then_another(outer: Run, run: Run) -> None:
    """Two forwards are outstanding; the backward of one fails in a nested recompute."""
    router = Router()

    def layers(x: torch.Tensor) -> Any:
        return run(router, run(router, x)).exp()

    first, second = (outer(layers, x).sum() for x in (leaf(), leaf()))
    handle = router.weight.register_hook(_fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        first.backward()
    handle.remove()
    router.recomputed.clear()
    second.backward()
    assert set(router.recomputed) <= {2, 3}


def _fail(grad: torch.Tensor) -> None:
    raise RuntimeError("out of memory")


@BOTH
def test_a_forward_inside_a_backward_hook_repeats_nothing(run: Run) -> None:
    """It is not taken for the recompute of the region whose backward is on the stack."""
    router = Router()
    x = leaf()
    y = run(router, x)
    y.register_hook(lambda grad: router(leaf()) and None)
    with pytest.raises(ReplayError, match="no other forward inside backward"):
        y.sum().backward()


def test_a_forward_in_the_backward_of_a_region_repeats_nothing() -> None:
    """Not even where the recompute left a call over: it belongs to another node of the graph."""
    router = Router()

    def region(x: torch.Tensor) -> Any:
        y = router(x)
        if in_backward():
            y.register_hook(lambda grad: router(leaf()) and None)
            return y.exp()
        return router(y).exp()

    with pytest.raises(ReplayError, match="no other forward inside backward"):
        reentrant(region, leaf()).sum().backward()


@BOTH
def test_a_recompute_that_makes_more_calls_is_refused(run: Run) -> None:
    """Its region has no value for them, and none of another region is taken."""
    router = Router()

    def region(x: torch.Tensor) -> Any:
        y = router(x)
        return router(y).exp() if in_backward() else y.sin().exp()

    losses = [run(region, leaf()).sum() for _ in range(2)]
    with pytest.raises(ReplayError, match="beyond the 1 of its region"):
        losses[0].backward()


def with_a_backward_inside(run: Run, router: Router) -> Callable[[torch.Tensor], torch.Tensor]:
    def region(x: torch.Tensor) -> Any:
        y = router(x)
        run(router, leaf()).sum().backward()
        return router(y).exp()

    return region


def test_a_backward_inside_a_region() -> None:
    """Its recomputes are its own, and the region's calls are repeated without them."""

    def gradient(outer: Run, inner: Run) -> Any:
        router, x = Router(), leaf()
        outer(with_a_backward_inside(inner, router), x).sum().backward()
        return x.grad

    torch.testing.assert_close(gradient(non_reentrant, non_reentrant), gradient(plain, plain))


def test_a_backward_inside_a_region_that_cannot_be_told_apart() -> None:
    """Its recomputes and the region's own calls would be one list: refused at once."""
    router = Router()
    with pytest.raises(ReplayError, match="a backward pass runs inside a checkpointed region"):
        non_reentrant(with_a_backward_inside(reentrant, router), leaf())


def test_an_unknown_checkpoint_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that holds the frame by another variable is named on entry, not a StopIteration."""
    _recompute.require_checkpoint_frames()
    monkeypatch.setattr(_recompute, "_FRAME_VARIABLES", ("elsewhere",))
    with pytest.raises(UnsupportedMegatronError, match="holds no variable out of"):
        _recompute.require_checkpoint_frames()
    with pytest.raises(ReplayError, match="this checkpoint implementation is not known"):
        non_reentrant(Router(), leaf())


@pytest.mark.parametrize("name", ["_checkpoint_hook", "_recomputation_hook"])
@pytest.mark.parametrize("change", ["name", "frame"])
def test_hooks_that_are_not_what_we_know_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, change: str
) -> None:
    """Under another name they would be passed over; another frame is another region's."""
    known = getattr(torch.utils.checkpoint, name)
    other = Router()

    def make(frame: object, *rest: Any) -> Any:
        held: Any = weakref.ref(other) if rest else other
        hook = known(held if change == "frame" else frame, *rest)
        hook.pack_hook.__qualname__ = "_other_hook" if change == "name" else name
        return hook

    monkeypatch.setattr(torch.utils.checkpoint, name, make)
    with pytest.raises(UnsupportedMegatronError, match="could not be matched to its forward"):
        _recompute.require_checkpoint_frames()


@BOTH
def test_two_backwards_of_one_graph(run: Run) -> None:
    """With retain_graph a region is recomputed again, with the same value."""
    router = Router()
    kept, other = run(router, leaf()).sum(), run(router, leaf()).sum()
    kept.backward(retain_graph=True)
    other.backward()
    kept.backward()
    assert router.recomputed == [0, 1, 0]


@BOTH
def test_backward_that_fails_leaves_nothing_behind(run: Run) -> None:
    """After an exception in the middle of a backward the next steps match as ever."""
    router = Router()

    def failing(x: torch.Tensor) -> Any:
        y = router(x)
        if in_backward():
            raise RuntimeError("boom")
        return y.exp()  # saves a tensor, or a non-reentrant recompute would stop before the raise

    with pytest.raises(RuntimeError, match="boom"):
        run(failing, leaf()).sum().backward()
    losses = [run(router, leaf()).sum() for _ in range(2)]
    for loss in losses:
        loss.backward()
    assert router.recomputed == [0, 1, 2]


def test_a_recompute_without_a_forward_is_refused() -> None:
    """A call in backward that repeats nothing of the log raises, and says what to do."""
    router = Router()
    loss = reentrant(router, leaf()).sum()
    router.log = CallLog()
    with pytest.raises(ReplayError, match="repeats no forward call of this session"):
        loss.backward()


@BOTH
def test_ended_backwards_free_their_calls(run: Run) -> None:
    """What no backward can repeat any more is gone, in nested regions too."""
    router = Router()
    for _ in range(3):
        run(lambda x: run(router, run(router, x)), leaf()).sum().backward()
    assert len(router.log) == 0
