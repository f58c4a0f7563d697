"""What the bridges share: taking a router out of a registry, and a tap that calls a manager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ManagerTap:
    """A main router's ``router_replay`` on stock Megatron: asks a manager written for a fork.

    Args:
        wrap: the manager's own wrapper around a top-k function of Megatron's.
        active: whether the manager would do anything at this moment.
    """

    def __init__(self, wrap: Callable[[Any], Any], active: Callable[[], bool]) -> None:
        self._wrap = wrap
        self._active = active

    @property
    def active(self) -> bool:
        return self._active()

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
