"""What the installed Megatron, and a model's settings, let replay do.

Everything here is found by looking, never by comparing version strings: Megatron's extension point
for replay, whether its top-k sorts, and the settings under which a router never reaches it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from r3patch import bridges
from r3patch._errors import UnsupportedMegatronError, UnsupportedRoutingError
from r3patch.bridges._attach import ManagerTap
from r3patch.labels.model import RouterInfo, routers
from r3patch.labels.scope import MAIN
from r3patch.sessions._tap import Tap

__all__ = ["Problem", "problems", "require_extension_point", "topk_sorts", "unfused"]


@dataclass(frozen=True)
class Problem:
    """A setting that keeps replay from a router (``error``) or weakens it (``warning``)."""

    name: str  # the router's path in the model
    setting: str
    text: str
    level: Literal["error", "warning"]

    def __str__(self) -> str:
        return f"{self.name}: {self.setting}: {self.text}"


def require_extension_point() -> None:
    """Raise unless the installed Megatron and torch offer what a session hangs on.

    Raises:
        UnsupportedMegatronError: ``topk_routing_with_score_function`` takes no ``router_replay``
            (Megatron before 0.16), or torch lacks the autograd introspection that recompute needs.
    """
    topk_function = _topk_function()
    if topk_function is None or "router_replay" not in inspect.signature(topk_function).parameters:
        raise UnsupportedMegatronError(
            "record and replay need the argument `router_replay` of megatron.core.transformer.moe."
            f"moe_utils.topk_routing_with_score_function; {_megatron_found()} has none. "
            "megatron-core 0.16 and newer have it; labels work from 0.12."
        )
    missing = [
        name
        for owner, name in (
            (torch._C, "_current_graph_task_id"),
            (torch._C, "_current_autograd_node"),
            (torch._C._autograd, "_get_sequence_nr"),
            (torch._C._autograd, "_top_saved_tensors_default_hooks"),
        )
        if not hasattr(owner, name)
    ]
    if missing:
        raise UnsupportedMegatronError(
            f"torch {torch.__version__} lacks {', '.join(missing)}, by which a recompute finds its "
            "forward call. torch 2.6 and newer are tested."
        )


def problems(model: Any) -> list[Problem]:
    """The settings of a model under which replay is refused or weakened, router by router."""
    found: list[Problem] = []
    for info in routers(model):
        if info.scope == MAIN:
            found += _router_problems(info)
    return found


def _router_problems(info: RouterInfo) -> Iterator[Problem]:
    config = info.module.config
    current = getattr(info.module, "router_replay", None)

    def error(setting: str, text: str) -> Problem:
        return Problem(info.name, setting, text, "error")

    if not any(cls.__qualname__ == "TopKRouter" for cls in type(info.module).__mro__):
        yield error(
            f"class {type(info.module).__qualname__}",
            "a Router that is no TopKRouter does not call Megatron's top-k, so replay cannot reach "
            "it. Derive it from TopKRouter.",
        )
        return
    routing = getattr(info.module, "routing_type", None)
    if routing in ("sinkhorn", "quantile_balancing"):
        yield error(
            f"moe_router_load_balancing_type={routing!r}",
            "this routing picks experts without Megatron's top-k. Use 'none', 'aux_loss' or "
            "'seq_aux_loss'.",
        )
    captured = _captured_by_cuda_graph(config)
    if captured:
        yield error(
            captured,
            "a CUDA graph repeats the routes of its capture. Leave the router out of the graph "
            "(cuda_graph_modules=['attn'], say) or set cuda_graph_impl='none'.",
        )
    if isinstance(current, Tap):
        yield error(
            "an open session",
            "this model is in a record or replay session. Leave it first.",
        )
    elif driver := _driver(info.module):
        yield error(
            driver,
            "another replay manager drives this router, and two replays on one call would "
            "contradict each other. Put that manager to rest before the session, by "
            "RouterReplay.clear_global_router_replay_action() or the stage 'fallthrough'.",
        )
    if getattr(config, "moe_expert_capacity_factor", None) is not None:
        yield Problem(
            info.name,
            f"moe_expert_capacity_factor={config.moe_expert_capacity_factor}",
            "assignments above the capacity are dropped after replay, so the trained routes are "
            "not the rollout's. Set it to None.",
            "warning",
        )
    if getattr(config, "moe_router_fusion", False):
        yield Problem(
            info.name,
            "moe_router_fusion=True",
            "the fused kernel returns before the extension point: sessions turn it off for their "
            "duration, so bits differ from the fused kernel's.",
            "warning",
        )


def is_hash_routed(info: RouterInfo) -> bool:
    """Whether the router chooses by token id (DeepSeek-V4's first layers): nothing to replay."""
    return bool(getattr(info.module, "is_hash_layer", False))


def unfused(config: Any) -> Any:
    """A shallow copy of the config with router fusion off; only a session's routers see it."""
    twin = copy.copy(config)
    twin.moe_router_fusion = False
    return twin


def mlp_chunks(config: Any) -> int:
    """Into how many pieces a layer may cut the microbatch before its router (1: never)."""
    return max(
        int(getattr(config, "mlp_chunks_for_training", 1) or 1),
        int(getattr(config, "mlp_chunks_for_prefill", 1) or 1),
    )


def topk_sorts(*, grouped: bool) -> bool:
    """Whether Megatron's top-k, called now, returns a row's ids by descending score.

    Always up to 0.17; from 0.18 with grad enabled, and always for group-limited routing. Asked of
    the installed function once per case.
    """
    return _topk_sorts(grouped, torch.is_grad_enabled())


@functools.cache
def _topk_sorts(grouped: bool, grad_enabled: bool) -> bool:
    topk_function = _topk_function()
    if topk_function is None:
        return True
    groups = {"num_groups": 2, "group_topk": 1} if grouped else {}
    with torch.set_grad_enabled(grad_enabled), _LastTopk() as spy:
        topk_function(torch.zeros(1, 4), 2, **groups)
    return bool(spy.sorted)


class _LastTopk(TorchFunctionMode):
    """Notes the ``sorted`` argument of the last ``torch.topk``: the one that picks the experts."""

    sorted = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "topk":
            self.sorted = bool((kwargs or {}).get("sorted", True))
        return func(*args, **(kwargs or {}))


def _topk_function() -> Callable[..., Any] | None:
    # The name in router.py's globals: the binding that TopKRouter.routing looks up at each call.
    try:
        from megatron.core.transformer.moe import router
    except ImportError:
        return None
    return getattr(router, "topk_routing_with_score_function", None)


def _driver(router: Any) -> str | None:
    """What drives a router at this moment; None while every manager rests."""
    replay = getattr(router, "router_replay", None)
    name = bridges.replaying(router, replay)
    if name is not None:
        return f"the replay manager {name} is replaying or recording"
    if replay is None or isinstance(replay, ManagerTap) or hasattr(replay, "router_replay_action"):
        return None
    return f"router_replay is a {type(replay).__qualname__}"


def _captured_by_cuda_graph(config: Any) -> str | None:
    """The setting by which a CUDA graph captures the router, or None.

    Source: ``TransformerConfig`` of megatron/core/transformer/transformer_config.py, 0.16.1
    (cuda_graph_scope) and 0.19.2 (cuda_graph_modules); an empty list means the whole layer.
    """
    impl = getattr(config, "cuda_graph_impl", "none") or "none"
    if impl == "none":
        return None
    modules = getattr(config, "cuda_graph_modules", None)
    if modules is None:
        modules = getattr(config, "cuda_graph_scope", None)
    if isinstance(modules, str):
        modules = modules.split(",")
    elif modules is None or not isinstance(modules, (list, tuple)):
        modules = [] if modules is None else [modules]
    names = [getattr(module, "name", str(module)) for module in modules]
    whole = not names or "full" in names or impl == "full_iteration"
    if whole or {"moe", "moe_router", "full_iteration"} & set(names):
        return f"cuda_graph_impl={impl!r} over {names or 'whole layers'}"
    return None


def _megatron_found() -> str:
    from importlib import metadata

    try:
        return f"the installed megatron-core {metadata.version('megatron-core')}"
    except metadata.PackageNotFoundError:
        return "the Megatron on the path"


def refuse(found: list[Problem]) -> None:
    """Raise for every problem of level ``error``.

    Raises:
        UnsupportedRoutingError: at least one.
    """
    errors = [str(problem) for problem in found if problem.level == "error"]
    if errors:
        raise UnsupportedRoutingError(
            f"replay cannot reach {len(errors)} router setting(s):\n  " + "\n  ".join(errors)
        )
