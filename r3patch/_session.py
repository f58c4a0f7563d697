"""What record and replay sessions share: entering, leaving, and the checks before either.

A session binds to the live modules of the given model chunks. It sets each router's
``router_replay``, Megatron's own extension point, to a tap; on leaving, by any way, every router is
as it was.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Generic, TypeVar

import torch

from r3patch import _megatron, _support
from r3patch._errors import ReplayError, UnsupportedRoutingError
from r3patch._megatron import RouterInfo
from r3patch._scope import MAIN
from r3patch._stream import RecordStream, ReplayStream
from r3patch._tap import Tap

logger = logging.getLogger(__name__)

Stream = TypeVar("Stream", RecordStream, ReplayStream)


class Gate:
    """Whether a session is open. What outlives the session holds this and nothing more of it."""

    def __init__(self) -> None:
        self.open = False


class Session(Generic[Stream]):
    """Entering and leaving: checks, one stream per chunk, one tap per router, restoration."""

    kind = ""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._chunks = _megatron.chunks(model)
        self._streams: list[Stream] = []
        self._taps: list[tuple[int, Tap]] = []  # with the index of the chunk
        self._undo = ExitStack()
        self._gate = Gate()
        self._entered = False

    def _open(self) -> None:
        if self._entered:
            raise ReplayError(f"this {self.kind} session was entered before; open a new one.")
        self._entered = True
        _support.require_extension_point()
        by_chunk = self._check_model()
        try:
            for index, (chunk, infos) in enumerate(zip(self._chunks, by_chunk, strict=True)):
                main = [info for info in infos if _replayed(info)]
                stream = self._stream(main)
                self._streams.append(stream)
                for info in infos:
                    tap = self._tap(info, stream) if _replayed(info) else Tap(info)
                    self._install(index, tap)
                handle = chunk.register_forward_hook(self._after_forward(stream))
                self._undo.callback(handle.remove)
            self._gate.open = True
        except BaseException:
            self._undo.close()
            raise
        _log_once(
            self.kind,
            sum(len(stream.layers) for stream in self._streams),
            sum(info.scope != MAIN for infos in by_chunk for info in infos),
        )

    def _check_model(self) -> list[list[RouterInfo]]:
        """The routers of each chunk, after every check that needs no data."""
        infos = _megatron.routers(self._chunks)
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
        _megatron.verify(self._chunks)
        found = _support.problems(self._chunks)
        for text in sorted({f"{p.setting}: {p.text}" for p in found if p.level == "warning"}):
            _warn_once(text)
        _support.refuse(found)
        if not infos and not any(_has_moe(chunk) for chunk in self._chunks):
            raise UnsupportedRoutingError(
                "the model has no MoE router and its config no num_moe_experts: there is nothing "
                f"to {self.kind}. Pass the policy model's chunks."
            )
        modules = [set(map(id, chunk.modules())) for chunk in self._chunks]
        return [[info for info in infos if id(info.module) in own] for own in modules]

    def _install(self, chunk: int, tap: Tap) -> None:
        router = tap.info.module
        self._undo.callback(setattr, router, "router_replay", router.router_replay)
        router.router_replay = tap
        self._taps.append((chunk, tap))
        # Routers that are not replayed keep the fused kernel: theirs are Megatron's own bits.
        if _replayed(tap.info) and getattr(router.config, "moe_router_fusion", False):
            self._undo.callback(setattr, router, "config", router.config)
            router.config = _support.unfused(router.config)

    def _close(self) -> None:
        self._gate.open = False
        self._undo.close()

    def _stream(self, main: list[RouterInfo]) -> Stream:
        raise NotImplementedError

    def _tap(self, info: RouterInfo, stream: Stream) -> Tap:
        raise NotImplementedError

    def _after_forward(self, stream: Stream) -> Callable[[Any, Any, Any], None]:
        raise NotImplementedError


def _replayed(info: RouterInfo) -> bool:
    return info.scope == MAIN and not _support.is_hash_routed(info)


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
