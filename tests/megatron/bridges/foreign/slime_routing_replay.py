"""A stand-in for slime/utils/routing_replay.py, written from its documented behaviour.

Environment variables, names and cursors are slime's; the code is not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar

ROUTING_REPLAY: Any = None


class RoutingReplay:
    all_routing_replays: ClassVar[list[RoutingReplay]] = []

    def __init__(self) -> None:
        self.top_indices_list: list[Any] = []
        self.forward_index = 0
        self.backward_index = 0
        RoutingReplay.all_routing_replays.append(self)


def get_routing_replay_compute_topk(old_compute_topk: Callable[..., Any]) -> Any:
    def compute_topk(
        scores: Any, topk: int, num_groups: int | None = None, group_topk: int | None = None
    ) -> Any:
        stage = os.environ.get("ROUTING_REPLAY_STAGE", "fallthrough")
        if os.environ.get("ENABLE_ROUTING_REPLAY", "0") != "1" or stage == "fallthrough":
            return old_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        cursor = "forward_index" if stage == "replay_forward" else "backward_index"
        index = getattr(ROUTING_REPLAY, cursor)
        ids = ROUTING_REPLAY.top_indices_list[index]
        setattr(ROUTING_REPLAY, cursor, index + 1)
        assert ids.shape == (scores.shape[0], topk)
        return scores.gather(1, ids), ids

    return compute_topk


def register_routing_replay(module: Any) -> None:
    if os.environ.get("ENABLE_ROUTING_REPLAY", "0") == "1":
        module.routing_replay = RoutingReplay()

        def pre_forward_hook(*args: Any, **kwargs: Any) -> None:
            global ROUTING_REPLAY
            ROUTING_REPLAY = module.routing_replay

        module.register_forward_pre_hook(pre_forward_hook)
