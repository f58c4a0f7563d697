"""slime: registration by ``register_routing_replay``, stages by environment variable.

slime's Megatron patch registers each router and wraps ``compute_topk``. On stock Megatron both are
done here for main routers. Routers in scope "mtp" are not in ``all_routing_replays``, so that the
count in slime's fill is right, and their calls see the stage "fallthrough".

Source: slime/utils/routing_replay.py, August 2026.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from r3patch.bridges._attach import connect, disconnect
from r3patch.bridges._shield import (
    Shield,
    drop_hooks,
    forget,
    is_shielded,
    uncover,
    warn_unregistered,
)
from r3patch.labels.scope import MTP

if TYPE_CHECKING:
    from types import ModuleType

MODULE = "slime.utils.routing_replay"
NEEDS: tuple[str, ...] = (
    "register_routing_replay",
    "get_routing_replay_compute_topk",
    "RoutingReplay.all_routing_replays",
)
ATTRIBUTE = "routing_replay"
ENABLE, STAGE, IDLE = "ENABLE_ROUTING_REPLAY", "ROUTING_REPLAY_STAGE", "fallthrough"


def govern(router: Any, scope: str, manager: ModuleType) -> None:
    if scope == MTP:
        _exclude(router, manager)
    elif is_shielded(router, rest):
        uncover(router, rest)
        warn_unregistered("slime")
    elif _is_enabled() and not _has_stream(router, manager):
        connect(
            router,
            lambda: manager.register_routing_replay(router),
            manager.get_routing_replay_compute_topk,
        )


def is_replaying(router: Any, replay: object, manager: ModuleType) -> bool:
    is_active = _is_enabled() and os.environ.get(STAGE, IDLE) != IDLE
    return is_active and _has_stream(router, manager)


def _is_enabled() -> bool:
    return os.environ.get(ENABLE, "0") == "1"


def _has_stream(router: Any, manager: ModuleType) -> bool:
    # miles keeps its streams under the same name.
    return isinstance(vars(router).get(ATTRIBUTE), manager.RoutingReplay)


def _exclude(router: Any, manager: ModuleType) -> None:
    if _has_stream(router, manager):
        forget(manager.RoutingReplay.all_routing_replays, vars(router).pop(ATTRIBUTE))
        drop_hooks(router, MODULE)
    disconnect(router)
    Shield(rest, wake).cover(router)


def rest() -> str | None:
    """Stop the manager; gives the stage in which it was, None where the variable was not set."""
    stage = os.environ.get(STAGE)
    os.environ[STAGE] = IDLE
    return stage


def wake(stage: str | None) -> None:
    """Give the manager its stage back."""
    if stage is None:
        os.environ.pop(STAGE, None)
    else:
        os.environ[STAGE] = stage
