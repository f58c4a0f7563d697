"""Other replay managers, governed: none of them keeps an MTP router.

A manager registers routers while they are built, MTP included, because it cannot tell them apart.
r3patch can: each time a router gets its label, the bridges of the managers that this process has
imported take routers in scope "mtp" out again, and let miles and slime find their main routers on
stock Megatron. One file per manager; none of them is imported for its own sake.

``R3PATCH_NATIVE`` and ``R3PATCH_BRIDGES`` say which managers are governed.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from r3patch import _config
from r3patch.bridges import _miles_indexer, miles, native, slime, verl
from r3patch.bridges._log import forget_logged, log_once
from r3patch.labels import patch
from r3patch.labels import scope as scopes
from r3patch.labels.patch import TargetStatus

if TYPE_CHECKING:
    from types import ModuleType

    from r3patch.bridges._contract import Bridge

__all__ = ["install", "miles", "native", "replaying", "slime", "status", "uninstall", "verl"]

_BRIDGES: dict[str, Bridge] = {"native": native, "miles": miles, "slime": slime, "verl": verl}


@dataclass
class _Failure:
    """What a bridge could not do since the last `uninstall`."""

    error: str
    """The first one."""
    modules: int = 0
    """Routers, or MTP layers whose attention was to be governed; each once."""
    seen: WeakSet[Any] = field(default_factory=WeakSet)


_failures: dict[str, _Failure] = {}
_lock = threading.Lock()


def install() -> None:
    """Govern routers from now on. Called by ``r3patch.install``; safe to call again."""
    if not _is_installed():
        scopes.listeners.append(_govern)
        scopes.constructions.append(_govern_construction)
        patch.reporters.append(_failed)


def uninstall() -> None:
    """Leave routers that are built from now on to their managers, and forget what failed."""
    if _is_installed():
        scopes.listeners.remove(_govern)
        scopes.constructions.remove(_govern_construction)
        patch.reporters.remove(_failed)
    with _lock:
        _failures.clear()
    forget_logged()


def status() -> tuple[TargetStatus, ...]:
    """Every manager that r3patch knows, and whether it is governed.

    ``pending``: the process has not imported it. ``installed``: it is governed. ``failed``: it has
    a shape that r3patch does not know, or governing a router raised; others are governed still.
    ``disabled``: by the environment or `uninstall`.
    """
    return tuple(TargetStatus(name, *_state(name)) for name in _BRIDGES)


def replaying(router: Any, replay: object) -> str | None:
    """The manager that would replay or record if this router ran now, governed or not.

    Changes nothing, and costs a few attribute reads while every manager rests: it can be asked at
    every routing call.

    Args:
        router: a Megatron ``Router``.
        replay: the ``router_replay`` that is the router's own; inside a session, what the session
            has set aside.

    Returns:
        ``"native"``, ``"miles"``, ``"slime"``, ``"verl"`` or None.
    """
    for name, bridge in _BRIDGES.items():
        manager = sys.modules.get(bridge.MODULE)
        if manager is None or _absent(bridge, manager):
            continue
        if bridge.is_replaying(router, replay, manager):
            return name
    return None


def _govern(router: Any) -> None:
    """Called with each router that was given a label; may be called again."""
    for name, manager in _governed():
        with _keeping_errors(name, router):
            _BRIDGES[name].govern(router, scopes.scope_of(router), manager)


@contextmanager
def _govern_construction(owner: Any, scope: str) -> Iterator[None]:
    """Around an MTP constructor: miles registers attention layers, too, which have no label."""
    known = _miles_indexer.streams(sys.modules.get(miles.MODULE))
    yield
    for name, manager in _governed():
        if name == "miles" and scope == scopes.MTP:
            with _keeping_errors(name, owner):
                _miles_indexer.exclude(owner, known, manager)


def _governed() -> Iterator[tuple[str, ModuleType]]:
    for name in _enabled():
        bridge = _BRIDGES[name]
        manager = sys.modules.get(bridge.MODULE)
        if manager is None:
            continue
        absent = _absent(bridge, manager)
        if absent:
            _warn(name, f"{bridge.MODULE} has no {', '.join(absent)}")
        else:
            log_once(f"r3patch governs {bridge.MODULE}", logging.INFO)
            yield name, manager


@contextmanager
def _keeping_errors(name: str, module: Any) -> Iterator[None]:
    """A constructor of Megatron's must not fail by a bridge, nor a bridge in silence."""
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        with _lock:
            failure = _failures.setdefault(name, _Failure(text))
            failure.modules += module not in failure.seen
            failure.seen.add(module)
        _warn(name, text)


def _warn(name: str, reason: str) -> None:
    log_once(
        f"r3patch does not govern {name}: {reason}. Its registry may hold MTP routers; is this a "
        "version that r3patch does not know?"
    )


def _state(name: str) -> tuple[str, str]:
    bridge = _BRIDGES[name]
    if not _is_installed():
        return "disabled", "r3patch is not installed"
    if name not in _enabled():
        return "disabled", f"by {_variable(name)}"
    manager = sys.modules.get(bridge.MODULE)
    if manager is None:
        return "pending", f"{bridge.MODULE} is not imported"
    absent, failure = _absent(bridge, manager), _failures.get(name)
    leave = f"{_variable(name)} can turn the bridge off"
    if absent:
        return "failed", f"{bridge.MODULE} has no {', '.join(absent)}; {leave}"
    if failure is not None:
        return "failed", f"{failure.error} (on {failure.modules} module(s)); {leave}"
    return "installed", bridge.MODULE


def _failed() -> Iterator[TargetStatus]:
    """What `r3patch.status` and `r3patch.verify` hear of: bridges that failed."""
    for name, state, detail in status():
        if state == "failed":
            yield TargetStatus(f"bridge {name}", state, detail)


def _is_installed() -> bool:
    return _govern in scopes.listeners


def _enabled() -> list[str]:
    native_too = ["native"] if _config.CONFIG.native == "govern" else []
    return [*native_too, *_config.CONFIG.bridges]


def _variable(name: str) -> str:
    return "R3PATCH_NATIVE" if name == "native" else "R3PATCH_BRIDGES"


def _absent(bridge: Bridge, manager: ModuleType) -> list[str]:
    return [path for path in bridge.NEEDS if not _reaches(manager, path)]


def _reaches(manager: Any, path: str) -> bool:
    for part in path.split("."):
        if not hasattr(manager, part):
            return False
        manager = getattr(manager, part)
    return True
