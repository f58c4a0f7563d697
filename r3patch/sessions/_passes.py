"""Where a forward pass of a chunk begins and ends, and whether it ended well.

The routers of a chunk take a microbatch together or not at all, and a pass that an exception ends
is taken back: its retry takes the same rows. (Figures count what was routed, so both passes.) Of
several chunks the one that failed goes on first. Another one's pass of the same microbatch may have
returned, and whether its next is a retry or the next microbatch cannot be seen.
Schedules that call a chunk layer by layer (combined 1F1B,
megatron/core/models/common/model_chunk_schedule_plan.py) never call its forward; there no pass is
known, and what the routers ask for has to speak for itself.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch
from torch import nn

from r3patch._errors import ReplayError
from r3patch.sessions._recompute import in_recompute

__all__ = ["ForwardPasses", "Listener", "innermost"]


class Listener(Protocol):
    """What follows the passes of a chunk."""

    def begin(self) -> None:
        """A forward pass begins."""

    def commit(self) -> None:
        """It has returned."""

    def rollback(self) -> None:
        """It has raised: what it has done since `begin` is to be undone."""


class ForwardPasses:
    """Tells a listener of the forward passes of one chunk, but not of those inside backward.

    Args:
        name: of the chunk; no other one of the session has it.
        listener: what is told.
        unreturned: shared by the chunks of a session. By name, the thread that is in a pass; None
            if the last pass has raised.
    """

    def __init__(
        self, name: str, listener: Listener, unreturned: dict[str, threading.Thread | None]
    ) -> None:
        self._name = name
        self._listener = listener
        self._unreturned = unreturned

    def watch(self, chunk: nn.Module) -> None:
        """Hook the chunk."""
        chunk = innermost(chunk)
        chunk.register_forward_pre_hook(self._begin)
        chunk.register_forward_hook(self._commit)
        chunk.register_forward_hook(self._end, always_call=True)

    def unwatch(self, chunk: nn.Module) -> None:
        """Take away what hooks of `watch` there are: it may have been interrupted."""
        chunk = innermost(chunk)
        for hooks in (chunk._forward_pre_hooks, chunk._forward_hooks):
            for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                hooks.pop(key)
                chunk._forward_hooks_always_called.pop(key, None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, chunk: Any, args: Any) -> None:
        if in_recompute():
            return  # the recompute of a checkpoint around the whole chunk
        here = threading.current_thread()
        for name, thread in tuple(self._unreturned.items()):
            if thread is None or thread is here or not thread.is_alive():
                self._go_on_before(name)
            elif name == self._name:
                raise ReplayError(
                    f"two threads ({thread.name} and {here.name}) run a forward pass of {name} at "
                    "the same time: which of them takes which microbatch is not known. Run one "
                    "after the other."
                )
        if self._running() is not None:  # left by what calls no hook: KeyboardInterrupt
            self._listener.rollback()
        self._unreturned[self._name] = here
        self._listener.begin()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _commit(self, chunk: Any, args: Any, output: Any) -> None:
        if self._running() is threading.current_thread() and not in_recompute():
            self._listener.commit()
            del self._unreturned[self._name]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, chunk: Any, args: Any, output: Any) -> None:
        if self._running() is threading.current_thread() and not in_recompute():
            self._unreturned[self._name] = None
            self._listener.rollback()

    def _go_on_before(self, failed: str) -> None:
        """After a pass that did not return only the same chunk may begin one."""
        if failed != self._name:
            raise ReplayError(
                f"a forward pass of {self._name} begins, but the last one of {failed} did not "
                f"return. Whether {self._name} is to take the same microbatch once more or the "
                f"next one is not known. Call {failed} again first, or open a new session for the "
                "retry."
            )

    def _running(self) -> threading.Thread | None:
        """The thread that runs the pass that is open."""
        return self._unreturned.get(self._name)


def innermost(chunk: nn.Module) -> nn.Module:
    """The model in DDP(Float16Module(model)): callers may use any of them, and all come here."""
    while isinstance(inner := getattr(chunk, "module", None), nn.Module):
        chunk = inner
    return chunk
