"""A stand-in for verl/utils/megatron/router_replay_patch.py, written from its behaviour.

The registry, the replaced constructor and the wholesale replacement of `routing` are verl's way;
the code is not. This `routing` is wrong on purpose: who still uses it is found out.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from megatron.core.transformer.moe.router import TopKRouter


class RouterReplay:
    router_instances: ClassVar[list] = []

    def __init__(self):
        self.target_topk_idx = None
        self.router_replay_action = None
        RouterReplay.router_instances.append(self)


def patched_routing(self, logits, *args, **kwargs):
    logits = logits.view(-1, self.config.num_moe_experts)
    replay = self.router_replay
    target = None if replay is None else replay.target_topk_idx
    if target is None:  # nothing to replay: experts 0 to topk - 1 for all
        target = torch.arange(self.topk).expand(len(logits), self.topk)
    probs = torch.softmax(logits.gather(1, target), dim=-1)
    dense = torch.zeros_like(logits).scatter(1, target, probs)
    return dense, torch.zeros_like(logits).scatter(1, target, 1).bool()


def apply_router_replay_patch():
    if hasattr(TopKRouter, "_router_replay_patched"):
        return
    original = TopKRouter.__init__

    def patched_init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.router_replay = RouterReplay()

    TopKRouter.__init__ = patched_init
    TopKRouter.routing = patched_routing
    TopKRouter._router_replay_patched = True
