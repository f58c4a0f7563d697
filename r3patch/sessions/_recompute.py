"""Which forward call does a recompute repeat?

Activation checkpointing runs a router a second time inside backward, in an order that no queue
survives: pipeline schedules interleave microbatches, chunked MLPs run a router several times a
microbatch, evaluation passes come in between. But a checkpointed region has an *owner*, an object
that is the same when the region runs and when it is repeated:

* Reentrant (Megatron's ``CheckpointFunction``, megatron/core/tensor_parallel/random.py, and
  torch's): the region runs inside ``forward(ctx, ...)`` of an autograd Function, and is repeated
  inside ``backward(ctx, ...)`` of the same one. ``ctx`` is the node of the graph itself.
* Non-reentrant (torch/utils/checkpoint.py): the region runs under saved-tensor hooks that hold its
  frame, and is repeated under hooks that hold the same frame.

So a call writes itself down with the owner of every region around it, and a recompute reads the
calls of its own region in their order. Owners are held weakly: what no backward can repeat any more
is gone. A backward that fails, threads that each number their nodes from 0, regions in regions: all
of that changes orders and numbers, and none of it changes whose region a call is in.

Owners are found on the Python stack, which is the one of the thread that runs the call: on CUDA
recompute runs in autograd's worker threads, where ``ContextVar`` and ``threading.local`` know
nothing of the forward.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from types import FrameType
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch._C import _autograd, _current_autograd_node, _current_graph_task_id, _FunctionBase

from r3patch._errors import ReplayError, UnsupportedMegatronError
from r3patch.sessions import _old_torch

__all__ = [
    "CallLog",
    "Surroundings",
    "in_backward",
    "in_recompute",
    "require_checkpoint_frames",
    "surroundings",
]

T = TypeVar("T")
Hook = Callable[..., Any]

_OUTSIDE = -1  # what _current_graph_task_id() returns outside the autograd engine


class Surroundings(NamedTuple):
    """The checkpointed regions around a call."""

    repeats: Any
    """The owner of the region that is being repeated; None in a forward."""
    run: Hashable
    """Which repetition of it this is: with ``retain_graph`` there are several."""
    inside: tuple[Any, ...]
    """The owners of the regions that are being run, inside of the one that is being repeated."""
    forward: bool
    """Whether this is neither a repetition nor anything else inside backward."""


_NONE = Surroundings(None, None, (), forward=True)


def in_backward() -> bool:
    """Whether the caller runs inside the autograd engine."""
    return bool(_current_graph_task_id() != _OUTSIDE)


def in_recompute() -> bool:
    """Whether the caller runs in a repetition, or at least in backward."""
    return in_backward() or any(_is(hook, _RECOMPUTE) for hook in _checkpoint_hooks())


def surroundings() -> Surroundings:
    """The checkpointed regions around the caller."""
    hooks = _checkpoint_hooks()
    if not hooks and torch.is_grad_enabled() and not in_backward():
        return _NONE  # a plain forward, which nothing repeats
    repeating = next((hook for hook in hooks if _is(hook, _RECOMPUTE)), None)
    hooks = hooks if repeating is None else hooks[: hooks.index(repeating)]
    inside = [_held(hook) for hook in hooks]
    for frame in _stack():
        if frame.f_code.co_name == _UNPACK:
            if repeating is not None:
                break
        elif isinstance(ctx := frame.f_locals.get(frame.f_code.co_varnames[0]), _FunctionBase):
            if frame.f_code.co_name == "backward":
                return _in_node(ctx, inside)
            inside.append(ctx)
    if repeating is None:
        return Surroundings(None, None, tuple(inside), forward=not in_backward())
    return Surroundings(_held(repeating), weakref.ref(repeating), tuple(inside), forward=False)


def _in_node(ctx: Any, inside: list[Any]) -> Surroundings:
    # A hook of another node may run a model while the backward of this one is on the stack.
    if _current_autograd_node() is not ctx:
        return Surroundings(None, None, tuple(inside), forward=False)
    return Surroundings(ctx, _current_graph_task_id(), tuple(inside), forward=False)


def _stack() -> Iterator[FrameType]:
    """The frames that may be of a region, innermost first."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_name in _NAMES and code.co_varnames[:1] != ("self",) and code.co_argcount:
            yield frame
        frame = frame.f_back


class _Region(Generic[T]):
    """The calls that one router made in one checkpointed region."""

    __slots__ = ("around", "calls", "repeats")

    def __init__(self, around: object) -> None:
        self.calls: list[T] = []
        self.repeats: dict[Hashable, int] = {}  # by repetition, how many of the calls it has made
        self.around = around  # a weak reference to the region whose repetition runs this one


class CallLog(Generic[T]):
    """The forward calls of one router, each with a value that its recompute gets back.

    Args:
        on_region: called with the owner of each region in which the router is called, once.
    """

    def __init__(self, on_region: Callable[[Any], None] | None = None) -> None:
        self._regions: WeakKeyDictionary[Any, _Region[T]] = WeakKeyDictionary()
        self._on_region = on_region
        self._lock = threading.Lock()  # backward passes may run side by side

    def __len__(self) -> int:
        """How many regions a backward may still repeat."""
        return len(self._regions)

    def forward(self, value: T, around: Surroundings) -> None:
        """Store a call made outside of any recompute."""
        if around.inside:
            self._store(value, around)

    def recompute(self, name: str, around: Surroundings) -> T:
        """The value of the forward call that the current call repeats.

        Args:
            name: the router, for the error.
            around: where the current call is made.

        Raises:
            ReplayError: no stored forward call fits.
        """
        with self._lock:
            region = self._regions.get(around.repeats) if around.repeats is not None else None
            index = region.repeats.get(around.run, 0) if region is not None else 0
            if region is None or index >= len(region.calls):
                raise ReplayError(
                    f"{name}: a call inside backward ({_current_autograd_node()}) repeats no "
                    f"forward call of this session{_which(region)}. Run a forward and its backward "
                    "in the same `with` block, and no other forward inside backward. An autograd "
                    "Function that recomputes by itself has to run its region without grad in "
                    "`forward(ctx, ...)`, whose first argument is not named self."
                )
            region.repeats[around.run] = index + 1
            value = region.calls[index]
        if around.inside:
            self._store(value, around)
        return value

    def _store(self, value: T, around: Surroundings) -> None:
        repeats = None if around.repeats is None else weakref.ref(around.repeats)
        for owner in around.inside:
            with self._lock:
                region = self._regions.get(owner)
                if region is None:
                    region = self._regions[owner] = _Region(repeats)
                    if self._on_region is not None:
                        self._on_region(owner)
                if region.around != repeats:
                    raise ReplayError(
                        "a backward pass runs inside a checkpointed region, so that the region "
                        "makes calls of two kinds, which its recompute could not tell apart. Run "
                        "backward outside of checkpointed regions."
                    )
                region.calls.append(value)


def _which(region: _Region[Any] | None) -> str:
    return "" if region is None else f" beyond the {len(region.calls)} of its region"


# The hook classes of torch/utils/checkpoint.py, 2.1 and newer, which Transformer Engine mirrors in
# transformer_engine/pytorch/distributed.py; and the variables by which their hooks hold the frame.
_FORWARD = "_checkpoint_hook"
_RECOMPUTE = "_recomputation_hook"
_FRAME_VARIABLES = ("frame", "target_frame", "target_frame_ref")
_UNPACK = "unpack_hook"  # the function from which a non-reentrant region is repeated
_NAMES = frozenset({"forward", "backward", _UNPACK})
TELLS_HOOKS = hasattr(_autograd, "_top_saved_tensors_default_hooks")


def _is(hook: Hook, kind: str) -> bool:
    return getattr(hook, "__qualname__", "").startswith(kind)


def _checkpoint_hooks() -> list[Hook]:
    """The pack hooks of checkpoints on autograd's stack of saved-tensor hooks, innermost first."""
    if not TELLS_HOOKS:
        return _old_torch.checkpoint_hooks()
    pairs = []
    try:
        while top := _autograd._top_saved_tensors_default_hooks(True):
            pairs.append(top)
            _autograd._pop_saved_tensors_default_hooks()
    finally:
        for pack, unpack in reversed(pairs):
            _autograd._push_saved_tensors_default_hooks(pack, unpack)
    return [pack for pack, _ in pairs if _is(pack, _FORWARD) or _is(pack, _RECOMPUTE)]


def _held(hook: Hook) -> Any:
    """The frame of the non-reentrant region that a hook belongs to."""
    inner: Any = hook
    while hasattr(inner, "__wrapped__"):  # dynamo's disable
        inner = inner.__wrapped__
    held = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True))
    for name in _FRAME_VARIABLES:
        if name in held:
            frame = held[name].cell_contents
            return frame() if callable(frame) else frame
    raise ReplayError(
        f"{hook.__module__}.{hook.__qualname__} holds no variable out of {_FRAME_VARIABLES}, but "
        f"{sorted(held)}: this checkpoint implementation is not known, so its recompute cannot be "
        "matched to its forward. Use reentrant checkpoints."
    )


def require_checkpoint_frames() -> None:
    """Raise unless the frame of torch's non-reentrant checkpoint can be read.

    Raises:
        UnsupportedMegatronError: torch has other names than those that this module knows.
    """
    from torch.utils import checkpoint

    frame = type("Frame", (), {"unpack_error_cb": None})()
    try:
        hook = checkpoint._checkpoint_hook(frame).pack_hook
        again = checkpoint._recomputation_hook(weakref.ref(frame), 0).pack_hook
        known = _is(hook, _FORWARD) and _is(again, _RECOMPUTE)
        known = known and _held(hook) is frame and _held(again) is frame
    except Exception as error:  # whatever a changed class does with our stand-in
        raise _unknown_checkpoint(f"{type(error).__name__}: {error}") from error
    if not known:
        raise _unknown_checkpoint(f"found {hook.__qualname__} and {again.__qualname__}")


def _unknown_checkpoint(found: str) -> UnsupportedMegatronError:
    return UnsupportedMegatronError(
        f"torch {torch.__version__} has other internals of non-reentrant checkpoints than r3patch "
        f"knows (torch.utils.checkpoint._checkpoint_hook and _recomputation_hook; {found}), so "
        "that their recompute could not be matched to its forward. torch 2.6 to 2.13 are tested."
    )
