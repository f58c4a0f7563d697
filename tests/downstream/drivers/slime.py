"""slime: its streams and the fill of its actor, on stock Megatron and with its patch of it."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from contract import Driver, Rollout
from loading import function_of, stub
from samples import Samples

NAME = "slime"
PACKAGE = "slime"
FOLDERS = ("slime",)
PATCHED = (False, True)
FORKS: tuple[str, ...] = ()
PIPELINE = True
OWN_FAULTS: dict[str, str] = {}
STAGE = "ROUTING_REPLAY_STAGE"


def open(checkout: Path, patched: bool) -> Driver:  # noqa: A001
    device = torch.device("cpu")
    accelerator = {"current_device": lambda: device}
    stub("slime.utils.accelerator", **accelerator)
    os.environ["ENABLE_ROUTING_REPLAY"], os.environ[STAGE] = "1", "fallthrough"
    replay = importlib.import_module("slime.utils.routing_replay")
    if patched:
        _patch_megatron(replay)
    cp_utils = importlib.import_module("slime.backends.megatron_utils.cp_utils")
    fill = function_of(
        checkout / "slime/backends/megatron_utils/actor.py",
        "MegatronTrainRayActor",
        "fill_routing_replay",
        prepare_routed_experts_for_routing_replay=(
            cp_utils.prepare_routed_experts_for_routing_replay
        ),
    )
    return _Driver(fill)


def _patch_megatron(replay: Any) -> None:
    """What docker/patch does to Megatron's source: registers routers, wraps their top-k."""
    from megatron.core.transformer.moe import router as module

    constructor, topk_function = module.TopKRouter.__init__, module.topk_routing_with_score_function

    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        constructor(self, *args, **kwargs)
        replay.register_routing_replay(self)

    def routed(*args: Any, **kwargs: Any) -> Any:
        kwargs["router_replay"] = _Wrapped(replay, kwargs.get("router_replay"))
        return topk_function(*args, **kwargs)

    module.TopKRouter.__init__ = construct
    module.topk_routing_with_score_function = routed


class _Wrapped:
    """slime's wrapper around the top-k that Megatron would use."""

    def __init__(self, replay: Any, own: Any) -> None:
        self.replay, self.own = replay, own

    def get_replay_topk(
        self, scores: Any, topk: int, num_groups: Any, group_topk: Any, default: Any
    ) -> Any:
        def inner(scores: Any, topk: int, num_groups: Any = None, group_topk: Any = None) -> Any:
            if self.own is None:
                return default(scores, topk, num_groups, group_topk)
            return self.own.get_replay_topk(scores, topk, num_groups, group_topk, default)

        choose = self.replay.get_routing_replay_compute_topk(inner)
        values, ids = choose(scores, topk, num_groups=num_groups, group_topk=group_topk)
        return values, ids.long()


class _Driver(Driver):
    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, fill: Any) -> None:
        self.own_fill = fill

    def fill(self, chunk: Any, rollout: Rollout, tokens: list[torch.Tensor]) -> None:
        key = "rollout_routed_experts"
        actor = SimpleNamespace(
            args=SimpleNamespace(
                num_experts=rollout.num_experts,
                data_pad_size_multiplier=1,
                sequence_parallel=False,
                allgather_cp=False,
            ),
            model=[SimpleNamespace(module=chunk)],
        )
        iterator = [Samples(key, rollout, tokens)]
        self.own_fill(actor, iterator, [len(tokens)], {key: list(rollout.experts)})
        os.environ[STAGE] = "replay_backward"

    def before(self, chunk: Any, microbatch: int) -> dict[str, Any]:
        os.environ[STAGE] = "replay_forward"
        return {}

    def after(self, chunk: Any, microbatch: int) -> None:
        os.environ[STAGE] = "replay_backward"
