"""Giving a manager that was written for a fork the extension point of stock Megatron."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from r3patch import _config
from r3patch.bridges._log import log_once
from r3patch.bridges._shield import forget
from r3patch.labels.targets import megatron_found


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
        """Megatron's extension point (moe_utils.py, 0.16 and newer), answered by the manager.

        Args:
            scores: ``[num_tokens, num_experts]`` float.

        Returns:
            Values and ids, each ``[num_tokens, topk]``, the ids int64.
        """
        values, ids = self._wrap(default_compute_topk)(
            scores, topk, num_groups=num_groups, group_topk=group_topk
        )
        return values, ids.long()  # managers keep int32, which not every torch scatters by


def connect(router: Any, register: Callable[[], Any], wrap: Callable[[Any], Any]) -> None:
    """Register a main router with a manager, and let Megatron ask it; or say what is in the way.

    A manager that somebody enabled goes before Megatron's own ``RouterReplay``, as on miles' fork.
    The native instance leaves its registry, where it would take data that it never replays.

    Args:
        register: enters the router into the manager's registry.
        wrap: see `ManagerTap`.
    """
    obstacle = _obstacle(router)
    if obstacle is not None:
        log_once(obstacle)
        return
    register()
    if getattr(router.config, "moe_router_fusion", False):
        log_once("moe_router_fusion returns before any replay: the manager's routes are not used")
    _set_native_aside(router)
    router.router_replay = ManagerTap(wrap)


def disconnect(router: Any) -> None:
    """Take the extension point back from a router that was labelled "main" before."""
    if isinstance(getattr(router, "router_replay", None), ManagerTap):
        router.router_replay = None


def _obstacle(router: Any) -> str | None:
    if not hasattr(router, "router_replay"):
        return (
            f"{megatron_found()} has no extension point for replay: looked for the attribute "
            f"router_replay of {type(router).__qualname__}. The manager's routes are not used"
        )
    if isinstance(router.router_replay, ManagerTap):
        return "two replay managers are enabled; the first that r3patch finds drives routers"
    return None


def _set_native_aside(router: Any) -> None:
    native = sys.modules.get("megatron.core.transformer.moe.router_replay")
    if native is None or _config.CONFIG.native == "leave":
        return  # its registry is not ours to touch
    if isinstance(router.router_replay, native.RouterReplay):
        forget(native.RouterReplay.global_router_replay_instances, router.router_replay)
        log_once("an enabled replay manager goes before Megatron's own RouterReplay")
