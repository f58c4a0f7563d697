"""Which forward call does a recompute repeat?

Activation checkpointing runs a router a second time inside backward, in an order that no queue
survives: pipeline schedules interleave microbatches, chunked MLPs run a router several times a
microbatch, evaluation passes come in between. Two kinds of checkpoint exist, and each says by
itself what it repeats:

* Reentrant (Megatron's ``CheckpointFunction``, megatron/core/tensor_parallel/random.py): the region
  runs without grad inside one autograd ``Function``, and the node of that Function repeats it.
  Autograd numbers what it records, and the node took its number before the region ran: the calls of
  the region are the first ones made without grad at a higher number.
* Non-reentrant (torch/utils/checkpoint.py): the region runs under saved-tensor hooks that hold its
  frame; the recompute runs under hooks that hold the same frame.

Regions nest: what a recompute runs may be recomputed again, by a backward inside backward whose
nodes belong to the graph that the outer recompute built. So each graph task keeps calls of its own,
until it ends.

On CUDA all of this runs in autograd's worker threads: the state lives on the object, never in a
``ContextVar`` or a ``threading.local``.
"""

from __future__ import annotations

import functools
import inspect
from bisect import bisect_right, insort_right
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch._C import _autograd, _current_autograd_node, _current_graph_task_id

from r3patch._errors import ReplayError

__all__ = ["CallLog", "in_backward"]

T = TypeVar("T")
Hook = Callable[..., Any]

_OUTSIDE = -1  # what _current_graph_task_id() returns outside the autograd engine
_number = attrgetter("number")


def in_backward() -> bool:
    """Whether the caller runs inside the autograd engine, that is, in a recompute."""
    return bool(_current_graph_task_id() != _OUTSIDE)


class _Call(Generic[T]):
    """One call made without grad: its sequence number, and the value it left for its recompute."""

    __slots__ = ("number", "repeats", "task", "value")

    def __init__(self, value: T) -> None:
        self.number: int = _autograd._get_sequence_nr()
        self.value = value
        self.task = _OUTSIDE  # the graph task that last repeated the region starting here,
        self.repeats = 0  # and how many of the region's calls it has repeated so far


class CallLog(Generic[T]):
    """The forward calls of one router, each with a value that its recompute gets back."""

    def __init__(self) -> None:
        # Calls without grad, by the graph task they were made in, sorted by number.
        self._spans: dict[int, list[_Call[T]]] = {_OUTSIDE: []}
        # Calls in non-reentrant regions, by frame; and how many a running recompute has repeated.
        self._frames: WeakKeyDictionary[Any, list[T]] = WeakKeyDictionary()
        self._repeats: WeakKeyDictionary[Hook, int] = WeakKeyDictionary()

    def forward(self, value: T) -> bool:
        """Store a call made outside the autograd engine; whether a recompute may repeat it."""
        if len(self._spans) > 1:  # a backward failed before its tasks could clean up
            self._spans = {_OUTSIDE: self._spans[_OUTSIDE]}
        return self._store(value, _OUTSIDE, _hooks())

    def recompute(self, name: str) -> T:
        """The value of the forward call that the current call, made inside the engine, repeats.

        Args:
            name: the router, for the error.

        Raises:
            ReplayError: no stored forward call fits.
        """
        task, hooks = _current_graph_task_id(), _hooks()
        repeating = next((hook for hook in hooks if _is(hook, _RECOMPUTE)), None)
        try:
            value = self._by_number(task) if repeating is None else self._by_frame(repeating)
        except LookupError:
            raise ReplayError(
                f"{name}: a call inside backward ({_current_autograd_node()}) repeats no forward "
                "call of this session. Run a forward and its backward in the same `with` block."
            ) from None
        self._store(value, task, hooks)
        return value

    def _store(self, value: T, task: int, hooks: list[Hook]) -> bool:
        frames = _frames(hooks, _FORWARD)
        for frame in frames:
            self._frames.setdefault(frame, []).append(value)
        if torch.is_grad_enabled():
            return bool(frames)
        if task not in self._spans:
            self._spans[task] = []
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(functools.partial(self._end, task))
        # Numbers are per thread: sorting keeps the search valid should forwards come from two.
        insort_right(self._spans[task], _Call(value), key=_number)
        return True

    def _end(self, task: int) -> None:
        self._spans.pop(task, None)

    def _by_number(self, task: int) -> T:
        # A backward inside backward repeats what the recompute around it ran.
        calls = self._spans[max(t for t in self._spans if t != task)]
        node = _current_autograd_node()
        if node is None:  # a callback of the engine: it repeats nothing
            raise LookupError
        first = bisect_right(calls, node._sequence_nr(), key=_number)
        head = calls[first]
        if head.task != task:
            head.task, head.repeats = task, 0
        head.repeats += 1
        return calls[first + head.repeats - 1].value

    def _by_frame(self, repeating: Hook) -> T:
        index = self._repeats.get(repeating, 0)
        self._repeats[repeating] = index + 1
        (frame,) = _frames([repeating], _RECOMPUTE)
        return self._frames[frame][index]


# The hook classes of torch/utils/checkpoint.py, 2.1 and newer, which Transformer Engine mirrors in
# transformer_engine/pytorch/distributed.py; and the variables by which their hooks hold the frame.
_FORWARD = "_checkpoint_hook"
_RECOMPUTE = "_recomputation_hook"
_FRAME_VARIABLES = ("frame", "target_frame", "target_frame_ref")


def _is(hook: Hook, kind: str) -> bool:
    return getattr(hook, "__qualname__", "").startswith(kind)


def _hooks() -> list[Hook]:
    """The pack hooks on autograd's stack of saved-tensor hooks, innermost first."""
    pairs = []
    while top := _autograd._top_saved_tensors_default_hooks(True):
        pairs.append(top)
        _autograd._pop_saved_tensors_default_hooks()
    for pack, unpack in reversed(pairs):
        _autograd._push_saved_tensors_default_hooks(pack, unpack)
    return [pack for pack, _ in pairs]


def _frames(hooks: list[Hook], kind: str) -> list[Any]:
    """The frames of the non-reentrant regions that these hooks belong to."""
    frames = []
    for hook in hooks:
        if _is(hook, kind):
            held = inspect.getclosurevars(inspect.unwrap(hook)).nonlocals  # unwrap dynamo's disable
            frame = next(held[name] for name in _FRAME_VARIABLES if name in held)
            frames.append(frame() if callable(frame) else frame)
    return frames
