"""What record and replay sessions share: the checks on entry, the taps, and restoration.

A session binds to the live modules of the given model chunks. It sets each router's
``router_replay``, Megatron's own extension point, to a tap; on leaving, by any way, every router is
as it was.
"""

from __future__ import annotations

import functools
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from r3patch._errors import R3PatchError, ReplayError
from r3patch.labels import model as models
from r3patch.labels.model import MainRouter, RouterInfo
from r3patch.labels.scope import MAIN
from r3patch.observe import trace
from r3patch.observe.stats import RouterStats
from r3patch.sessions import _preflight
from r3patch.sessions._passes import ForwardPasses, Listener
from r3patch.sessions._tap import Tap
from r3patch.sessions._tokens import TokenWatch

if TYPE_CHECKING:
    from r3patch.labels.model import Model

__all__ = ["Chunk", "Lifetime", "Plan", "Session", "readable"]

logger = logging.getLogger(__name__)

# From the check that no other session is open to the last tap in place.
_entering = threading.RLock()


@dataclass
class Chunk:
    """A model chunk on entry: its routers, and what the session replays or records of them."""

    module: nn.Module
    index: int
    routers: list[RouterInfo] = field(default_factory=list)
    main: list[MainRouter] = field(default_factory=list)

    @property
    def num_experts(self) -> int | None:
        """What the model's config says; pruned layers have fewer."""
        number = getattr(getattr(self.module, "config", None), "num_moe_experts", None)
        return None if number is None else int(number)

    @property
    def name(self) -> str:
        return f"chunk {self.index} ({type(self.module).__qualname__})"


@dataclass
class Plan:
    """What a session puts into one chunk: a tap for each main router, and what follows passes."""

    chunk: Chunk
    taps: Sequence[Tap]
    listener: Listener
    tokens: TokenWatch | None = None


class Lifetime:
    """Whether a session is open, and what takes it out of the model. Knows nothing of its data.

    What outlives a session, a hook in the graph for example, holds this.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.open = False
        self.entered = False
        self._undo: list[Callable[[], object]] = []

    def undo(self, action: Callable[[], object]) -> None:
        """Remember how to take back what is done next. Doing it twice must be harmless."""
        self._undo.append(action)

    def close(self) -> None:
        """Take everything back, last first; goes on where a KeyboardInterrupt stops it."""
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                self.open = False
                while self._undo:
                    self._undo[-1]()
                    self._undo.pop()
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def collected(self) -> None:
        """Called when the session object is gone: somebody may have forgotten something."""
        if self.open:
            self.close()
            text = f"a {self.kind} session was open and nobody held it: its routers are restored"
        elif not self.entered:
            text = f"a {self.kind} session was never entered: routers ran live"
        else:
            self.close()
            return
        text += f". Write `with r3patch.{self.kind}(...) as session:` around forward and backward."
        logger.warning("%s", text)
        warnings.warn(text, ResourceWarning, stacklevel=2)


class Session:
    """A model that was checked, with taps in its routers, for some time."""

    def __init__(self, kind: str, model: Model, step: int | None, name: str | None) -> None:
        self._chunks = models.chunks(model)
        self._step, self._name = step, name
        self._taps: list[Tap] = []
        self._main: list[MainRouter] = []
        self._notes: dict[str, float] = {}
        self._unreturned: dict[str, threading.Thread | None] = {}  # see ForwardPasses
        self._lifetime = Lifetime(kind)
        # At exit of the interpreter, everything is collected: no news then.
        self._forgotten = weakref.finalize(self, self._lifetime.collected)
        self._forgotten.atexit = False

    def note(self, **numbers: float) -> None:
        """Add numbers of the step (a policy gap, say) to the session's trace record."""
        self._notes.update({name: float(number) for name, number in numbers.items()})

    def _enter(self, prepare: Callable[[list[Chunk]], list[Plan]]) -> None:
        """Check the model, prepare, and put the taps in place; or leave no trace in it."""
        life = self._lifetime
        if life.entered:
            raise ReplayError(f"this {life.kind} session was entered before; open a new one.")
        life.entered = True
        try:
            with _entering:
                plans = prepare(_check(self._chunks, life.kind))
                for plan in plans:
                    self._main += plan.chunk.main
                    self._install(plan)
                life.open = True
        except BaseException:
            life.close()
            self._forgotten.detach()
            raise
        _log_once(life.kind, len(self._main), len(self._taps) - len(self._main))

    def _install(self, plan: Plan) -> None:
        by_router = {id(tap.info.module): tap for tap in plan.taps}
        for info in plan.chunk.routers:
            tap = by_router.get(id(info.module))
            # Routers that are not replayed keep the fused kernel: theirs are Megatron's own bits.
            if tap is not None and getattr(info.module.config, "moe_router_fusion", False):
                self._set(info.module, "config", _preflight.unfused(info.module.config))
            # An MTP head's own Router class may lack the extension point: it routes live anyway.
            if tap is not None or hasattr(info.module, "router_replay"):
                tap = Tap(info, plan.chunk.index) if tap is None else tap
                self._set(info.module, "router_replay", tap)
                self._taps.append(tap)
        passes = ForwardPasses(plan.chunk.name, plan.listener, self._unreturned)
        self._lifetime.undo(functools.partial(passes.unwatch, plan.chunk.module))
        passes.watch(plan.chunk.module)
        if plan.tokens is not None:
            self._lifetime.undo(plan.tokens.unwatch)
            plan.tokens.watch()

    def _set(self, router: Any, name: str, value: object) -> None:
        self._lifetime.undo(functools.partial(setattr, router, name, getattr(router, name)))
        setattr(router, name, value)

    def _leave(self, error: BaseException | None) -> bool:
        """Take the taps out again; False where there are none, because it was left before.

        Raises:
            ReplayError: it was never entered, and no other error is on its way.
        """
        life = self._lifetime
        if not life.entered and error is None:
            raise ReplayError(
                f"this {life.kind} session is closed and was never entered: what ran before it ran "
                f"live. Call open() first, or write `with r3patch.{life.kind}(...) as session:`."
            )
        was_open = life.open
        life.close()
        self._forgotten.detach()
        return was_open

    def _router_stats(self) -> tuple[RouterStats, ...]:
        topk = {id(router.module): router.topk for router in self._main}
        return tuple(
            RouterStats(
                tap.info.name,
                tap.chunk,
                str(tap.info.scope),
                tap.info.layer_number,
                topk=topk.get(id(tap.info.module)) or int(tap.info.module.config.moe_router_topk),
                hash_routed=tap.info.scope == MAIN and not _preflight.takes_routes(tap.info),
                **tap.counts(),
            )
            for tap in self._taps
        )

    def _trace(self, record: Callable[[], Mapping[str, Any]]) -> None:
        """Write the session's line. An instrument: it stops nothing and hides no other error."""
        if not trace.enabled():
            return
        try:
            trace.write(record())
        except Exception:
            logger.warning("trace: this session's line is missing", exc_info=True)


def readable(error: BaseException | None) -> bool:
    """Whether figures can be read: after a failure of the device, reading them would raise."""
    return error is None or isinstance(error, R3PatchError)


def _check(modules: Sequence[nn.Module], kind: str) -> list[Chunk]:
    """The chunks with their routers, after every check that needs no data."""
    _preflight.require_extension_point()
    _preflight.refuse_twice(modules)
    found = models.find(modules)
    _preflight.refuse_shared(found)
    _preflight.refuse_open_session(found)
    models.check(found)
    infos = [router.info for router in found]
    problems = _preflight.problems(infos)
    for text in sorted({f"{p.setting}: {p.text}" for p in problems if p.level == "warning"}):
        _warn_once(text)
    _preflight.refuse(problems)
    _preflight.require_moe(modules, infos, kind)
    chunks = [Chunk(module, index) for index, module in enumerate(modules)]
    for router, info in zip(found, infos, strict=True):
        chunk = chunks[router.chunks[0]]
        chunk.routers.append(info)
        if _preflight.takes_routes(info):
            chunk.main.append(MainRouter.of(info))
    return chunks


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


@functools.cache
def _log_once(kind: str, main: int, rest: int) -> None:
    logger.info("%s session: %d main routers, %d other routers left alone", kind, main, rest)
