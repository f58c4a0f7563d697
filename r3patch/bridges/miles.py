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

MODULE = "miles.utils.replay_base"
NEEDS: tuple[str, ...] = (
    "routing_replay_manager.register_to_module",
    "routing_replay_manager.get_topk_fn",
    "routing_replay_manager.replays",
    "routing_replay_manager.stage",
    "routing_replay_manager.enabled",
)
#: Where the fork, too, keeps a router's stream.
ATTRIBUTE = "routing_replay"
IDLE = "fallthrough"


def govern(router: Any, scope: str, manager: ModuleType) -> None:
    routing = manager.routing_replay_manager
    if scope == MTP:
        remove_streams(router, routing)
        disconnect(router)
        Shield(rest, wake).cover(router)
    elif is_shielded(router, rest):
        uncover(router, rest)
        warn_unregistered("miles")
    elif routing.enabled and not streams(router, routing):
        connect(
            router,
            lambda: routing.register_to_module(router, ATTRIBUTE),
            lambda topk: routing.get_topk_fn(topk, return_probs=True),
        )


def is_replaying(router: Any, replay: object, manager: ModuleType) -> bool:
    routing = manager.routing_replay_manager
    return bool(routing.enabled and routing.stage != IDLE and streams(router, routing))


def streams(module: Any, manager: Any) -> dict[str, Any]:
    """The attributes of a module that hold a stream of the manager: who registers it names it."""
    known = {id(replay) for replay in manager.replays}
    return {name: value for name, value in vars(module).items() if id(value) in known}


def remove_streams(module: Any, manager: Any) -> None:
    """Make it as if the module had not been registered."""
    for name, stream in streams(module, manager).items():
        forget(manager.replays, stream)
        delattr(module, name)
        drop_hooks(module, MODULE)


def rest() -> str:
    """Stop the manager; gives the stage in which it was."""
    manager = sys.modules[MODULE].routing_replay_manager
    stage, manager.stage = manager.stage, IDLE
    return str(stage)


def wake(stage: str) -> None:
    """Give the manager its stage back."""
    sys.modules[MODULE].routing_replay_manager.stage = stage
