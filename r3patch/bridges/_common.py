"""What the bridges share: taking a router out of a registry, and a tap that calls a manager."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from r3patch._config import CONFIG

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
    """Whether the router has an extension point that no other foreign manager has taken."""
    if not hasattr(router, "router_replay"):
        _warn_once("this Megatron has no extension point for replay (0.16 and newer have it)")
        return False
    if isinstance(router.router_replay, ManagerTap):
        _warn_once("two replay managers are enabled; the first that r3patch finds drives routers")
        return False
    return True


def attach(router: Any, tap: ManagerTap) -> None:
    """Give a manager the router's extension point, in place of a native ``RouterReplay``.

    A manager that somebody enabled goes before the native one, as on miles' fork. The native
    instance leaves its registry, where it would take data that it never replays.
    """
    native = sys.modules.get("megatron.core.transformer.moe.router_replay")
    replay = router.router_replay
    if getattr(router.config, "moe_router_fusion", False):
        _warn_once("moe_router_fusion returns before any replay: the manager's routes are not used")
    if native is None or CONFIG.native == "leave":
        pass  # its registry is not ours to touch
    elif isinstance(replay, native.RouterReplay):
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


class Shield:
    """Around every forward of a router, by exceptions too, keep a manager out of it.

    A fork's top-k function asks the manager whatever the router, and finds there what the last
    main router left. On stock Megatron nothing asks, and the shield has no effect. Its hooks are
    methods rather than closures, so that a model with MTP can still be pickled.

    Args:
        rest: a module-level function that puts the manager to rest and returns its stage.
        wake: a module-level function that gives the manager that stage back.
    """

    def __init__(self, rest: Callable[[], Any], wake: Callable[[Any], None]) -> None:
        self._rest, self._wake = rest, wake
        self._stages: list[Any] = []

    def before(self, router: Any, args: Any) -> None:
        self._stages.append(self._rest())

    def after(self, router: Any, args: Any, output: Any) -> None:
        if self._stages:
            self._wake(self._stages.pop())

    def raise_for(self, router: Any) -> None:
        """Set it up, once for each manager."""
        if not _shield_keys(router._forward_pre_hooks, self._rest):
            router.register_forward_pre_hook(self.before)
            router.register_forward_hook(self.after, always_call=True)


def is_main_again(router: Any, rest: Callable[[], Any], name: str) -> bool:
    """Whether a router that was "mtp" is "main" now: takes its shield away, and says so."""
    keys = _shield_keys(router._forward_pre_hooks, rest)
    for key in keys:
        del router._forward_pre_hooks[key]
    for key in _shield_keys(router._forward_hooks, rest):
        del router._forward_hooks[key]
        router._forward_hooks_always_called.pop(key, None)
    if keys:
        warn_unregistered(name)
    return bool(keys)


def warn_unregistered(name: str) -> None:
    """A manager fills its streams by position, so a router cannot come back at the end."""
    _warn_once(
        f"a router was labelled main again, but {name} does not replay on it: label routers "
        "before the manager registers them, or rebuild the model"
    )


def _shield_keys(hooks: Any, rest: Callable[[], Any]) -> list[int]:
    owners = {key: getattr(hook, "__self__", None) for key, hook in hooks.items()}
    return [k for k, owner in owners.items() if isinstance(owner, Shield) and owner._rest is rest]
