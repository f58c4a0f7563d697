"""A stand-in for verl/utils/megatron/router_replay_patch.py, written from its behaviour.

The registry, the replaced constructor and the wholesale replacement of `routing` are verl's way;
the code is not. This `routing` is wrong on purpose: who still uses it is found out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum
from typing import Any, ClassVar

import torch
from megatron.core.transformer.moe.router import TopKRouter

Selection = tuple[torch.Tensor, torch.Tensor]


class RouterReplayAction(Enum):
    REPLAY_FORWARD = "replay_forward"
    REPLAY_BACKWARD = "replay_backward"


class RouterReplay:
    router_instances: ClassVar[list[RouterReplay]] = []

    @staticmethod
    def set_global_router_replay_action(action: RouterReplayAction | None) -> None:
        for replay in RouterReplay.router_instances:
            replay.router_replay_action = action

    def __init__(self) -> None:
        self.target_topk_idx: torch.Tensor | None = None
        self.router_replay_action: RouterReplayAction | None = None
        self.replay_backward_list: list[torch.Tensor | None] = []
        RouterReplay.router_instances.append(self)

    def target(self) -> torch.Tensor | None:
        if self.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
            self.replay_backward_list.append(self.target_topk_idx)
            return self.target_topk_idx
        if self.router_replay_action is RouterReplayAction.REPLAY_BACKWARD:
            return self.replay_backward_list.pop(0) if self.replay_backward_list else None
        return None

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: Any,
        group_topk: Any,
        default_compute_topk: Callable[..., Selection],
    ) -> Selection:
        target = self.target()
        if target is None:
            return default_compute_topk(scores, topk, num_groups, group_topk)
        return scores.gather(1, target), target


def first_experts(scores: torch.Tensor, topk: int, num_groups: Any, group_topk: Any) -> Selection:
    """Nothing to replay: experts 0 to topk - 1 for all."""
    ids = torch.arange(topk).expand(len(scores), topk)
    return scores.gather(1, ids), ids


def patched_routing(self: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    logits = logits.view(-1, self.config.num_moe_experts)
    choose: Callable[..., Selection] = first_experts
    if self.router_replay is not None:
        choose = functools.partial(
            self.router_replay.get_replay_topk, default_compute_topk=first_experts
        )
    values, target = choose(logits, self.topk, None, None)
    probs = torch.softmax(values, dim=-1)
    dense = torch.zeros_like(logits).scatter(1, target, probs)
    return dense, torch.zeros_like(logits).scatter(1, target, 1).bool()


def apply_router_replay_patch() -> None:
    if hasattr(TopKRouter, "_router_replay_patched"):
        return
    original = TopKRouter.__init__

    def patched_init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.router_replay = RouterReplay()

    TopKRouter.__init__ = patched_init
    TopKRouter.routing = patched_routing
    TopKRouter._router_replay_patched = True
