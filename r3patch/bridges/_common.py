"""What the bridges share: taking a router out of a registry, and a tap that calls a manager."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


class ManagerTap:
    """A main router's ``router_replay`` on stock Megatron: asks a manager written for a fork.

    Args:
        wrap: the manager's own wrapper around a top-k function of Megatron's.
    """

    def __init__(self, wrap: Callable[[Any], Any]) -> None:
        self._wrap = wrap

    def get_replay_topk(
        self,
        scores: Any,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[Any, Any]:
        """Megatron's extension point (moe_utils.py, 0.16 and newer), answered by the manager."""
        values, ids = self._wrap(default_compute_topk)(
            scores, topk, num_groups=num_groups, group_topk=group_topk
        )
        return values, ids.long()  # managers keep int32, which not every torch scatters by


def is_free(router: Any) -> bool:
    """Whether no other foreign manager has the router's extension point: the first one keeps it."""
    if not isinstance(getattr(router, "router_replay", None), ManagerTap):
        return True
    _warn_once("two replay managers are enabled; the first that r3patch finds drives the routers")
    return False


def attach(router: Any, tap: ManagerTap) -> None:
    """Give a manager the router's extension point, in place of a native ``RouterReplay``.

    A manager that somebody enabled goes before the native one, as on miles' fork. The native
    instance leaves its registry, where it would take data that it never replays.
    """
    native = sys.modules.get("megatron.core.transformer.moe.router_replay")
    replay = router.router_replay
    if native is not None and isinstance(replay, native.RouterReplay):
        forget(native.RouterReplay.global_router_replay_instances, replay)
        _warn_once("an enabled replay manager goes before Megatron's own RouterReplay")
    router.router_replay = tap


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def forget(registry: list[Any], entry: object) -> None:
    """Remove an object from a registry, by identity."""
    registry[:] = [known for known in registry if known is not entry]


def drop_hooks(router: Any, module_name: str) -> None:
    """Remove the forward-pre-hooks that a manager's module has put on a router."""
    hooks = router._forward_pre_hooks
    for key in [k for k, hook in hooks.items() if getattr(hook, "__module__", "") == module_name]:
        del hooks[key]


def shield(router: Any, enter: Callable[[], Callable[[], None]]) -> None:
    """Around every forward of a router, by exceptions too, keep a manager out of it.

    A fork's top-k function asks the manager whatever the router, and finds there what the last
    main router left. On stock Megatron nothing asks, and the shield has no effect.

    Args:
        enter: puts the manager to rest and returns what wakes it.
    """
    if getattr(router, "_r3_shielded", False):
        return
    router._r3_shielded = True
    wake: list[Callable[[], None]] = []

    def before(module: Any, args: Any) -> None:
        wake.append(enter())

    def after(module: Any, args: Any, output: Any) -> None:
        if wake:
            wake.pop()()

    router.register_forward_pre_hook(before)
    router.register_forward_hook(after, always_call=True)
