"""What record and replay sessions share: entering, leaving, and the checks before either.

A session binds to the live modules of the given model chunks. It sets each router's
``router_replay``, Megatron's own extension point, to a tap; on leaving, by any way, every router is
as it was.
"""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from r3patch._errors import R3PatchError, ReplayError, UnsupportedRoutingError
from r3patch.labels import model as models
from r3patch.labels.model import RouterInfo
from r3patch.labels.scope import MAIN, scope_of
from r3patch.observe import trace
from r3patch.observe.stats import ReplayStats, RouterStats
from r3patch.sessions import _preflight
from r3patch.sessions._stream import RecordStream, ReplayStream
from r3patch.sessions._tap import Tap

if TYPE_CHECKING:
    from r3patch.metrics import ExpertLoad

logger = logging.getLogger(__name__)

Stream = TypeVar("Stream", RecordStream, ReplayStream)
S = TypeVar("S", bound="Session[Any]")


class Gate:
    """Whether a session is open. What outlives the session holds this and nothing more of it."""

    def __init__(self) -> None:
        self.open = False


class Session(ABC, Generic[Stream]):
    """Entering and leaving: checks, one stream per chunk, one tap per router, restoration."""

    kind = ""

    def __init__(self, model: Any, step: int | None = None) -> None:
        self._chunks = models.chunks(model)
        self._step = step
        self._streams: list[Stream] = []
        self._taps: list[tuple[int, Tap]] = []  # with the index of the chunk
        self._undo = ExitStack()
        self._gate = Gate()
        self._entered = False
        self._notes: dict[str, float] = {}

    def __enter__(self: S) -> S:
        if self._entered:
            raise ReplayError(f"this {self.kind} session was entered before; open a new one.")
        self._entered = True
        try:
            _preflight.require_extension_point()
            self._install(self._check_model())
            self._gate.open = True
            self._begin()
        except BaseException as error:
            self._close()
            self._trace(error)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
        try:
            if error is None:
                self._end()
        except ReplayError as failure:
            error = failure
            raise
        finally:
            self._trace(error)

    def note(self, **numbers: float) -> None:
        """Add numbers of the step (a policy gap, say) to the session's trace record."""
        self._notes.update({name: float(number) for name, number in numbers.items()})

    @property
    def stats(self) -> ReplayStats:
        """What the session did so far. Reading measured figures waits for the device."""
        return ReplayStats(
            tuple(_router_stats(tap, chunk) for chunk, tap in self._taps),
            self._token_codes(),
            sum(stream.seconds for stream in self._streams),
        )

    def _check_model(self) -> list[list[RouterInfo]]:
        """The routers of each chunk, after every check that needs no data."""
        infos = models.routers(self._chunks)
        tapped = [
            info.name
            for info in infos
            if isinstance(getattr(info.module, "router_replay", None), Tap)
        ]
        if tapped:
            raise ReplayError(
                f"{tapped[0]} is in an open session already: sessions on one model do not nest. "
                "Leave the first `with` block before the second."
            )
        models.verify(self._chunks)
        found = _preflight.problems(self._chunks)
        for text in sorted({f"{p.setting}: {p.text}" for p in found if p.level == "warning"}):
            _warn_once(text)
        _preflight.refuse(found)
        if not infos and not any(_has_moe(chunk) for chunk in self._chunks):
            raise UnsupportedRoutingError(
                "the model has no MoE router and its config no num_moe_experts: there is nothing "
                f"to {self.kind}. Pass the policy model's chunks."
            )
        modules = [set(map(id, chunk.modules())) for chunk in self._chunks]
        return [[info for info in infos if id(info.module) in own] for own in modules]

    def _install(self, by_chunk: list[list[RouterInfo]]) -> None:
        for index, (chunk, infos) in enumerate(zip(self._chunks, by_chunk, strict=True)):
            stream = self._stream([info for info in infos if _replayed(info)])
            self._streams.append(stream)
            for info in infos:
                tap = self._tap(info, stream) if _replayed(info) else Tap(info)
                self._taps.append((index, tap))
                self._tap_into(tap)
            handle = chunk.register_forward_hook(self._after_forward(stream))
            self._undo.callback(handle.remove)
        _log_once(
            self.kind,
            sum(len(stream.layers) for stream in self._streams),
            sum(info.scope != MAIN for infos in by_chunk for info in infos),
        )

    def _tap_into(self, tap: Tap) -> None:
        router = tap.info.module
        self._undo.callback(setattr, router, "router_replay", router.router_replay)
        router.router_replay = tap
        # Routers that are not replayed keep the fused kernel: theirs are Megatron's own bits.
        if _replayed(tap.info) and getattr(router.config, "moe_router_fusion", False):
            self._undo.callback(setattr, router, "config", router.config)
            router.config = _preflight.unfused(router.config)

    def _close(self) -> None:
        self._gate.open = False
        self._undo.close()

    def _trace(self, error: BaseException | None) -> None:
        if not trace.enabled():
            return
        # After a failure of the device, reading figures would raise over the first error.
        readable = error is None or isinstance(error, R3PatchError)
        record = trace.session(
            self.kind,
            step=self._step,
            stats=self.stats if readable else None,
            notes=self._notes,
            expert_load=self._expert_load() if error is None else None,
            error=error,
        )
        trace.write(record)

    # What record and replay do each in their own way.

    @abstractmethod
    def _stream(self, main: list[RouterInfo]) -> Stream:
        """The data of one chunk, whose main routers these are."""

    @abstractmethod
    def _tap(self, info: RouterInfo, stream: Stream) -> Tap:
        """What a main router asks."""

    @abstractmethod
    def _after_forward(self, stream: Stream) -> Callable[[Any, Any, Any], None]:
        """A forward hook for the chunk."""

    @abstractmethod
    def _end(self) -> None:
        """On leaving without an exception: raise if the session did less than it should."""

    def _begin(self) -> None:
        """On entering, when the taps are in place."""

    def _token_codes(self) -> bytes:
        """See ``ReplayStats.tokens``."""
        return b""

    def _expert_load(self) -> ExpertLoad | None:
        return None


def _router_stats(tap: Tap, chunk: int) -> RouterStats:
    info = tap.info
    topk = int(info.module.config.moe_router_topk)
    scope = scope_of(info.module)
    return RouterStats(info.name, chunk, scope, info.layer_number, topk=topk, **tap.counts())


def _replayed(info: RouterInfo) -> bool:
    return info.scope == MAIN and not _preflight.is_hash_routed(info)


def _has_moe(chunk: torch.nn.Module) -> bool:
    return any(
        getattr(getattr(module, "config", None), "num_moe_experts", None)
        for module in chunk.modules()
    )


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


@functools.cache
def _log_once(kind: str, main: int, mtp: int) -> None:
    logger.info("%s session: %d main routers, %d routers in scope mtp left alone", kind, main, mtp)
