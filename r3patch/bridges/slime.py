"""slime: registration by ``register_routing_replay``, stages by environment variable.

slime's Megatron patch registers each router and wraps ``compute_topk``. On stock Megatron both are
done here for main routers. Routers in scope "mtp" are not in ``all_routing_replays``, so that the
count in slime's fill is right, and their calls see the stage "fallthrough".

Source: slime/utils/routing_replay.py, August 2026.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from r3patch.bridges._common import (
    ManagerTap,
    Shield,
    attach,
    drop_hooks,
    forget,
    is_free,
    is_main_again,
)
from r3patch.labels.scope import MTP

if TYPE_CHECKING:
    from types import ModuleType

MODULE = "slime.utils.routing_replay"
NEEDS = (
    "register_routing_replay",
    "get_routing_replay_compute_topk",
    "RoutingReplay.all_routing_replays",
)
ATTRIBUTE = "routing_replay"
ENABLE, STAGE, IDLE = "ENABLE_ROUTING_REPLAY", "ROUTING_REPLAY_STAGE", "fallthrough"


def govern(router: Any, scope: str, module: ModuleType) -> None:
    if scope == MTP:
        _exclude(router, module)
    elif is_main_again(router, rest, "slime"):
        return
    elif _enabled() and not hasattr(router, ATTRIBUTE) and is_free(router):
        module.register_routing_replay(router)
        attach(router, ManagerTap(module.get_routing_replay_compute_topk))


def drives(router: Any, module: ModuleType) -> bool:
    return _enabled() and os.environ.get(STAGE, IDLE) != IDLE and hasattr(router, ATTRIBUTE)


def _enabled() -> bool:
    return os.environ.get(ENABLE, "0") == "1"


def _exclude(router: Any, module: ModuleType) -> None:
    stream = vars(router).pop(ATTRIBUTE, None)
    if stream is not None:
        forget(module.RoutingReplay.all_routing_replays, stream)
        drop_hooks(router, MODULE)
    if isinstance(getattr(router, "router_replay", None), ManagerTap):
        router.router_replay = None  # it was labelled "main" before

    Shield(rest, wake).raise_for(router)


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
