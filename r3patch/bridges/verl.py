"""verl: its patch replaces ``TopKRouter.routing`` and keeps a registry of its own.

The patch gives every router a ``RouterReplay`` of verl's and routes by verl's copy of Megatron's
``routing``. A router in scope "mtp" leaves the registry, has no replay, and routes by Megatron's
own function again. The order of the two patches does not matter: a router is governed at the end
of its own constructor and once more when the MTP constructor around it is done.

Source: verl/utils/megatron/router_replay_patch.py, 2026.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from r3patch.bridges._shield import forget, warn_unregistered
from r3patch.labels.scope import MTP

if TYPE_CHECKING:
    from types import ModuleType

MODULE = "verl.utils.megatron.router_replay_patch"
NEEDS: tuple[str, ...] = ("RouterReplay.router_instances", "apply_router_replay_patch")
_ROUTER = "megatron.core.transformer.moe.router"
_OWN = "r3patch_own_router"


def govern(router: Any, scope: str, manager: ModuleType) -> None:
    if scope == MTP:
        _exclude(router, manager)
    elif _routes_by_own(router):  # it was labelled "mtp" before
        del router.routing
        warn_unregistered("verl")


def is_replaying(router: Any, replay: object, manager: ModuleType) -> bool:
    action = getattr(replay, "router_replay_action", None)
    return isinstance(replay, manager.RouterReplay) and action is not None


def _exclude(router: Any, manager: ModuleType) -> None:
    replay = getattr(router, "router_replay", None)
    if isinstance(replay, manager.RouterReplay):
        forget(manager.RouterReplay.router_instances, replay)
        router.router_replay = None
    is_patched = getattr(type(router).routing, "__module__", _ROUTER) == MODULE
    if is_patched and not _routes_by_own(router):
        router.routing = OwnRouting(router)


def _routes_by_own(router: Any) -> bool:
    return isinstance(vars(router).get("routing"), OwnRouting)


class OwnRouting:
    """Megatron's ``routing`` of one router: what a bound method is, and pickles as itself.

    A method would be pickled by its name, and come back as the method of the class: verl's.
    """

    def __init__(self, router: Any) -> None:
        self._router, self._routing = router, own_routing()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._routing(self._router, *args, **kwargs)

    def __reduce__(self) -> tuple[type[OwnRouting], tuple[Any]]:
        return OwnRouting, (self._router,)


def own_routing() -> Any:
    """``TopKRouter.routing`` as Megatron wrote it: from its file, for verl keeps no original."""
    path = sys.modules[_ROUTER].__file__
    spec = importlib.util.spec_from_file_location(_OWN, path)
    assert spec is not None
    assert spec.loader is not None
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    return own.TopKRouter.routing
