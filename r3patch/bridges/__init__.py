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
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from r3patch._config import CONFIG
from r3patch.bridges import miles, native, slime, verl
from r3patch.labels import scope as scopes

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["BridgeStatus", "install", "miles", "native", "slime", "status", "uninstall", "verl"]

logger = logging.getLogger(__name__)

_BRIDGES = {"native": native, "miles": miles, "slime": slime, "verl": verl}
_checked: dict[str, str] = {}  # the reason for which a bridge refuses its manager, "" for none


class BridgeStatus(NamedTuple):
    """One manager, and whether it is governed."""

    name: str
    state: str
    """``pending`` (not imported), ``installed``, ``failed`` or ``disabled``."""
    detail: str


def install() -> None:
    """Govern routers from now on. Called by ``r3patch.install``; safe to call again."""
    if _govern not in scopes.listeners:
        scopes.listeners.append(_govern)


def uninstall() -> None:
    """Leave routers that are built from now on to their managers."""
    if _govern in scopes.listeners:
        scopes.listeners.remove(_govern)


def status() -> list[BridgeStatus]:
    """Every manager that r3patch knows."""
    return [BridgeStatus(name, *_state(name)) for name in _BRIDGES]


def driver(router: Any) -> str | None:
    """The manager that replays or records on this router at the moment, governed or not."""
    for name, bridge in _BRIDGES.items():
        manager = sys.modules.get(bridge.MODULE)
        if manager is not None and not _reason(name, manager) and bridge.drives(router, manager):
            return name
    return None


def _state(name: str) -> tuple[str, str]:
    module = _BRIDGES[name].MODULE
    if name not in _enabled() or _govern not in scopes.listeners:
        variable = "R3PATCH_NATIVE" if name == "native" else "R3PATCH_BRIDGES"
        return "disabled", f"{variable}, or r3patch is not installed"
    manager = sys.modules.get(module)
    if manager is None:
        return "pending", f"{module} is not imported"
    reason = _reason(name, manager)
    return ("failed", reason) if reason else ("installed", module)


def _enabled() -> list[str]:
    return (["native"] if CONFIG.native == "govern" else []) + list(CONFIG.bridges)


def _govern(router: Any) -> None:
    """Called with each router that was given a label; may be called again."""
    for name, manager in _managers():
        try:
            _BRIDGES[name].govern(router, scopes.scope_of(router), manager)
        except Exception as error:  # a constructor of Megatron's must not fail by a bridge
            _refuse(name, f"{type(error).__name__}: {error}")


def _managers() -> Iterator[tuple[str, ModuleType]]:
    for name in _enabled():
        manager = sys.modules.get(_BRIDGES[name].MODULE)
        if manager is not None and not _reason(name, manager):
            yield name, manager


def _reason(name: str, manager: ModuleType) -> str:
    """Why the manager is left alone: a shape that the bridge does not know."""
    if name not in _checked:
        absent = [path for path in _BRIDGES[name].NEEDS if not _reaches(manager, path)]
        if absent:
            _refuse(name, f"{manager.__name__} has no {', '.join(absent)}")
        else:
            _checked[name] = ""
            logger.info("r3patch governs %s", manager.__name__)
    return _checked[name]


def _refuse(name: str, reason: str) -> None:
    _checked[name] = reason
    logger.warning(
        "r3patch does not govern %s: %s. Its registry may hold MTP routers; is this a version that "
        "r3patch does not know?",
        name,
        reason,
    )


def _reaches(manager: Any, path: str) -> bool:
    for part in path.split("."):
        if not hasattr(manager, part):
            return False
        manager = getattr(manager, part)
    return True
