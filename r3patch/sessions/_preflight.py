"""What the installed Megatron, and a model's settings, let replay do.

Everything here is found by looking, never by comparing version strings: Megatron's extension point
for replay, whether its top-k sorts, and the settings under which a router never reaches it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from r3patch import bridges
from r3patch._errors import ReplayError, UnsupportedMegatronError, UnsupportedRoutingError
from r3patch.bridges._attach import ManagerTap
from r3patch.labels.model import Found, MainRouter, RouterInfo
from r3patch.labels.scope import MAIN
from r3patch.labels.targets import megatron_found
from r3patch.sessions._recompute import require_checkpoint_frames
from r3patch.sessions._tap import Tap


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
            (before 0.16, forks), or torch lacks the autograd introspection that recompute needs.
    """
    topk_function = _topk_function()
    if topk_function is None or "router_replay" not in inspect.signature(topk_function).parameters:
        raise UnsupportedMegatronError(
            "record and replay need the argument `router_replay` of megatron.core.transformer.moe."
            f"moe_utils.topk_routing_with_score_function. {megatron_found()} has "
            f"{'no such function' if topk_function is None else 'the function, without it'}. The "
            "stock releases 0.16.1 to 0.19.2 have it, forks of the same version may not. Labels "
            "and bridges do without."
        )
    missing = [
        name
        for owner, name in (
            (torch._C, "_current_graph_task_id"),
            (torch._C, "_current_autograd_node"),
        )
        if not hasattr(owner, name)
    ]
    if missing:
        raise UnsupportedMegatronError(
            f"torch {torch.__version__} lacks {', '.join(missing)}, by which a recompute finds its "
            "forward call. torch 2.6 and newer are tested."
        )
    require_checkpoint_frames()


def problems(routers: Sequence[RouterInfo]) -> list[Problem]:
    """The settings of a model under which replay is refused or weakened, router by router."""
    main = [info for info in routers if info.scope == MAIN]
    found = [problem for info in main for problem in _router_problems(info)]
    return found + list(_unequal_topk(main))


def _unequal_topk(main: Sequence[RouterInfo]) -> Iterator[Problem]:
    for info in main:
        topk, others = (getattr(i.module.config, "moe_router_topk", None) for i in (info, main[0]))
        if topk != others:
            yield Problem(
                info.name,
                f"moe_router_topk={topk}",
                f"{main[0].name} has {others}, and routes hold as many experts of each layer. "
                "Layers with different topk cannot be replayed.",
                "error",
            )
            return


def _router_problems(info: RouterInfo) -> Iterator[Problem]:
    if not any(cls.__qualname__ == "TopKRouter" for cls in type(info.module).__mro__):
        yield Problem(
            info.name,
            f"class {type(info.module).__qualname__}",
            "a Router that is no TopKRouter does not call Megatron's top-k, so replay cannot reach "
            "it. Derive it from TopKRouter.",
            "error",
        )
        return
    for setting, text in _unreachable(info.module):
        yield Problem(info.name, setting, text, "error")
    for setting, text in _weakened(info.module.config):
        yield Problem(info.name, setting, text, "warning")


def _unreachable(router: Any) -> Iterator[tuple[str, str]]:
    """Settings under which replay does not reach a router, or means nothing."""
    config = router.config
    routing = getattr(router, "routing_type", None)
    if routing in ("sinkhorn", "quantile_balancing"):
        yield (
            f"moe_router_load_balancing_type={routing!r}",
            (
                "this routing picks experts without Megatron's top-k. Use 'none', 'aux_loss' or "
                "'seq_aux_loss'."
            ),
        )
    for setting in ("moe_router_force_load_balancing", "moe_router_force_biased"):
        if getattr(config, setting, None) not in (None, False):
            yield (
                f"{setting}={getattr(config, setting)!r}",
                (
                    "logits are replaced by noise, and gate weights come from them. It is for "
                    "benchmarks: unset it."
                ),
            )
    captured = _captured_by_cuda_graph(config)
    if captured:
        yield (
            captured,
            (
                "a CUDA graph repeats the routes of its capture. Leave the router out of the graph "
                "(cuda_graph_modules=['attn'], say) or set cuda_graph_impl='none'."
            ),
        )
    if isinstance(getattr(router, "router_replay", None), Tap):
        yield (
            "an open session",
            "this model is in a record or replay session. Leave it first.",
        )
    elif driver := _driver(router):
        yield (
            driver,
            (
                "another replay manager drives this router, and two replays on one call would "
                "contradict each other. Put that manager to rest before the session, by "
                "RouterReplay.clear_global_router_replay_action() or the stage 'fallthrough'."
            ),
        )


def _weakened(config: Any) -> Iterator[tuple[str, str]]:
    """Settings with which a session does less than its user may think."""
    if getattr(config, "moe_expert_capacity_factor", None) is not None:
        yield (
            f"moe_expert_capacity_factor={config.moe_expert_capacity_factor}",
            (
                "assignments above the capacity are dropped after replay, so the trained routes "
                "are not the rollout's. Set it to None."
            ),
        )
    if getattr(config, "moe_router_fusion", False):
        yield (
            "moe_router_fusion=True",
            (
                "the fused kernel returns before the extension point: sessions turn it off for "
                "their duration, so bits differ from the fused kernel's."
            ),
        )


def takes_routes(info: RouterInfo) -> bool:
    """Whether a session records or replays this router.

    Routers that choose by token id (DeepSeek-V4's first layers) have nothing to replay.
    """
    return info.scope == MAIN and not getattr(info.module, "is_hash_layer", False)


def refuse_twice(chunks: Sequence[nn.Module]) -> None:
    """Raise if a chunk is listed twice.

    Raises:
        ReplayError: it is.
    """
    for index, chunk in enumerate(chunks):
        if any(chunk is other for other in chunks[:index]):
            raise ReplayError(
                f"chunk {index} of the model ({type(chunk).__qualname__}) is there before: each of "
                "its forward passes would count twice. List every chunk once."
            )


def refuse_shared(found: Sequence[Found]) -> None:
    """Raise if a router that takes routes is a part of two chunks.

    Raises:
        ReplayError: it is.
    """
    for router in found:
        if len(router.chunks) > 1 and takes_routes(router.info):
            raise ReplayError(
                f"{router.name} (layer {router.info.layer_number}) is a part of chunks "
                f"{router.chunks}, and each chunk runs every microbatch: which rows a call takes "
                "is not known. Build the chunks without shared MoE layers."
            )


def refuse_open_session(found: Sequence[Found]) -> None:
    """Raise if a session is open on one of the routers.

    Raises:
        ReplayError: it is.
    """
    for router in found:
        if isinstance(getattr(router.module, "router_replay", None), Tap):
            raise ReplayError(
                f"{router.name} is in an open session already: sessions on one model do not nest. "
                "Leave the first `with` block before the second."
            )


def require_moe(chunks: Sequence[nn.Module], routers: Sequence[RouterInfo], kind: str) -> None:
    """Raise if there is nothing to do on any rank; one rank of a MoE model may have no MoE layer.

    Raises:
        UnsupportedRoutingError: the model has no routers, and its config no experts.
    """
    if routers or any(_has_moe(chunk) for chunk in chunks):
        return
    raise UnsupportedRoutingError(
        "the model has no MoE router and its config no num_moe_experts: there is nothing to "
        f"{kind}. Pass the policy model's chunks."
    )


def _has_moe(chunk: nn.Module) -> bool:
    return any(
        getattr(getattr(module, "config", None), "num_moe_experts", None)
        for module in chunk.modules()
    )


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


def sums_in_order(router: MainRouter) -> bool:
    """Whether the order of a row's ids changes bits: Megatron sums over the row's scores.

    It does not after a softmax over all experts, nor where a row has one id, or two: a + b is b + a
    to the bit.
    Source: ``topk_routing_with_score_function``, megatron/core/transformer/moe/moe_utils.py,
    0.16.1 to 0.19.2.
    """
    config = router.module.config
    pre_softmax = config.moe_router_score_function == "softmax" and config.moe_router_pre_softmax
    return router.topk > 2 and not pre_softmax


@functools.cache
def topk_sorts(*, grouped: bool, grad_enabled: bool) -> bool:
    """Whether Megatron's top-k returns a row's ids by descending score.

    Always up to 0.17; from 0.18 with grad enabled, and always for group-limited routing. Asked of
    the installed function once per case.
    """
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


def tensor_parallel() -> tuple[int, int]:
    """The number of tensor-parallel ranks and this one's, by Megatron's parallel state."""
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return 1, 0
    size = int(state.get_tensor_model_parallel_world_size())
    return size, int(state.get_tensor_model_parallel_rank())


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
