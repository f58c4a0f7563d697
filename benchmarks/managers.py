"""The two published designs of a replay manager, as plainly as they can be written.

Written from their behaviour, to compare costs with; they have no place for MTP routers, recompute
in another order than first in, first out, or rows in another order than Megatron's.
"""

from __future__ import annotations

from typing import Any

import torch

Selection = tuple[torch.Tensor, torch.Tensor]


class GlobalManager:
    """One tensor on the host for each layer and microbatch, a blocking copy at each call.

    A row of -1 has no routes and gets the experts ``0 .. topk - 1``. As miles and slime do.
    """

    def __init__(self) -> None:
        self.queue: list[torch.Tensor] = []
        self.next = 0

    def add(self, ids: torch.Tensor) -> None:
        """Append the rows ``[num_tokens, topk]`` of a microbatch; -1 for no routes."""
        self.queue.append(ids.to(torch.int32).contiguous())

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: Any, group_topk: Any, default: Any
    ) -> Selection:
        ids = self.queue[self.next].to(scores.device, copy=True)
        self.next += 1
        assert ids.shape == (scores.shape[0], topk)
        missing = (ids == -1).all(dim=1)
        fill = torch.arange(topk, dtype=ids.dtype, device=ids.device) % scores.shape[1]
        ids = torch.where(missing.unsqueeze(1), fill, ids).long()
        return scores.gather(1, ids), ids


class MaskedList:
    """Targets and a mask: masked rows take the targets, the others Megatron's choice. As verl does.

    The choice is made for all rows, and again in recompute.
    """

    def __init__(self) -> None:
        self.targets: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """Append the rows ``[num_tokens, topk] int64`` of a microbatch, and which of them count."""
        self.targets.append((ids, mask))

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: Any, group_topk: Any, default: Any
    ) -> Selection:
        ids, mask = self.targets.pop(0)
        _, own = default(scores, topk, num_groups, group_topk)
        ids = torch.where(mask.unsqueeze(1), ids.to(scores.device), own)
        return scores.gather(1, ids), ids
