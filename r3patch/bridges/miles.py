"""miles: ``routing_replay_manager``, on its Megatron fork and on stock Megatron.

The fork registers each router with the manager and wraps every top-k in ``get_topk_fn``. On stock
Megatron neither happens: here main routers are registered, in the order in which they are built,
and the wrapper is reached through Megatron's extension point. Routers in scope "mtp" are in no
case registered, and the manager rests while one of them runs, whatever its ``current`` is.

Source: miles/utils/replay_base.py, August 2026.
"""

from __future__ import annotations

import sys
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

MODULE = "miles.utils.replay_base"
NEEDS = (
    "routing_replay_manager.register_to_module",
    "routing_replay_manager.get_topk_fn",
    "routing_replay_manager.replays",
    "routing_replay_manager.stage",
    "routing_replay_manager.enabled",
)
#: Where the fork, too, keeps a router's stream.
ATTRIBUTE = "routing_replay"
IDLE = "fallthrough"


def govern(router: Any, scope: str, module: ModuleType) -> None:
    manager = module.routing_replay_manager
    if scope == MTP:
        _exclude(router, manager)
    elif is_main_again(router, rest, "miles"):
        return
    elif manager.enabled and not _streams(router, manager) and is_free(router):
        manager.register_to_module(router, ATTRIBUTE)
        attach(router, ManagerTap(lambda topk: manager.get_topk_fn(topk, return_probs=True)))


def drives(router: Any, module: ModuleType) -> bool:
    manager = module.routing_replay_manager
    return bool(manager.enabled and manager.stage != IDLE and _streams(router, manager))


def _streams(router: Any, manager: Any) -> dict[str, Any]:
    """The attributes of the router that hold a stream of the manager: the fork chose the name."""
    known = {id(replay) for replay in manager.replays}
    return {name: value for name, value in vars(router).items() if id(value) in known}


def _exclude(router: Any, manager: Any) -> None:
    for name, stream in _streams(router, manager).items():
        forget(manager.replays, stream)
        delattr(router, name)
        drop_hooks(router, MODULE)
    if isinstance(getattr(router, "router_replay", None), ManagerTap):
        router.router_replay = None  # it was labelled "main" before

    Shield(rest, wake).raise_for(router)


def rest() -> str:
    """Stop the manager; gives the stage in which it was."""
    manager = sys.modules[MODULE].routing_replay_manager
    stage, manager.stage = manager.stage, IDLE
    return str(stage)


def wake(stage: str) -> None:
    """Give the manager its stage back."""
    sys.modules[MODULE].routing_replay_manager.stage = stage
