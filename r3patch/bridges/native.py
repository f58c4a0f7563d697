"""Megatron's own ``RouterReplay`` (0.16 and newer), which NeMo-RL, SkyRL and others drive.

With ``moe_enable_routing_replay`` each router's constructor makes a ``RouterReplay``, which enters
a global list. An instance of a router in scope "mtp" leaves the list, and the router has none:
``set_replay_data`` takes decoder layers only, and ``get_recorded_data`` gives the same ones.

Source: megatron/core/transformer/moe/router_replay.py and TopKRouter.__init__, 0.16.1 and 0.19.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from r3patch.bridges._shield import forget
from r3patch.labels.scope import MTP

if TYPE_CHECKING:
    from types import ModuleType

    from r3patch.rows.routes import Routes

MODULE = "megatron.core.transformer.moe.router_replay"
NEEDS: tuple[str, ...] = ("RouterReplay.global_router_replay_instances",)


def govern(router: Any, scope: str, manager: ModuleType) -> None:
    replay = getattr(router, "router_replay", None)
    if scope == MTP and isinstance(replay, manager.RouterReplay):
        forget(manager.RouterReplay.global_router_replay_instances, replay)
        router.router_replay = None


def is_replaying(router: Any, replay: object, manager: ModuleType) -> bool:
    action = getattr(replay, "router_replay_action", None)
    return isinstance(replay, manager.RouterReplay) and action is not None


def drive(model: Any, routes: Routes, *, missing: Literal["error", "spread"] = "error") -> None:
    """Set one microbatch's routes on the native instances of a live model's main routers.

    For those who use Megatron's own actions. It fills the routers of the model that is given, not
    the global list, in which orphans of a rebuilt decoder and other models stand as well.

    Args:
        model: a module or a list of chunks.
        routes: this rank's rows in the router's order, with a column for every main router.
        missing: invalid rows are an error, because the native replay has no live rows; or they get
            distinct experts in turn.

    Raises:
        RoutesError: the routes do not fit the model, or have invalid rows under ``"error"``.
        ReplayError: a main router has no native instance, or one that no global action reaches
            and that has no action of its own: somebody cleared Megatron's list.
    """
    from r3patch._errors import ReplayError
    from r3patch.labels.model import main_routers
    from r3patch.labels.targets import megatron_found
    from r3patch.rows.fit import check_fit
    from r3patch.rows.spread import spread_missing

    routers = main_routers(model)
    check_fit(routes, routers, "drive()", missing=missing)
    bare = [r.name for r in routers if not hasattr(r.module.router_replay, "set_target_indices")]
    if bare or not routers:
        raise ReplayError(
            f"{bare or 'the model'} has no RouterReplay to drive. Build the model with "
            f"moe_enable_routing_replay=True, where it has this setting: it is {megatron_found()}."
        )
    lost = [router.name for router in routers if _is_out_of_reach(router.module.router_replay)]
    if lost:
        raise ReplayError(
            f"the RouterReplay of {', '.join(lost)} is not in Megatron's global list, so that no "
            "global action reaches it: clear_global_router_replay_instances() was called after the "
            "model was built, as it is once a reference model has been built. Set the action on "
            "the instances, router.router_replay.set_router_replay_action(action), before drive(); "
            "or append them to RouterReplay.global_router_replay_instances."
        )
    for router in routers:
        column = routes.select([router.layer_number])
        ids = column.experts.permute(1, 0, 2).long()  # a copy, [1, num_tokens, topk]
        if column.valid is not None:
            gaps = (~column.valid[:, 0]).nonzero().squeeze(1)
            spread_missing(ids, [gaps], [router.num_experts])
        router.module.router_replay.set_target_indices(ids[0].to(router.module.weight.device))


def _is_out_of_reach(replay: Any) -> bool:
    listed = any(known is replay for known in type(replay).global_router_replay_instances)
    return not listed and replay.router_replay_action is None
