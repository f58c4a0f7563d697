"""The tap: what a router's ``router_replay`` is while a session is open.

Megatron calls ``router_replay.get_replay_topk(scores, topk, num_groups, group_topk,
default_compute_topk)`` where it would take its own top-k, and computes the gate weights from the
ids it gets back. A tap answers that one call.
Source: ``topk_routing_with_score_function``, megatron/core/transformer/moe/moe_utils.py, 0.16+.

Shapes: ``scores [num_tokens, num_experts]`` float, ids ``[num_tokens, topk] int64``.

Nothing here waits for the device: no ``.item()``, no ``bool(tensor)``, no blocking copy. And
whatever is computed on the side, for a choice or a figure, saves no tensor for backward and is seen
by no selective checkpoint: forward and recompute must run the same operations on the same tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import checkpoint
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from r3patch import bridges
from r3patch._errors import ReplayError, UnsupportedRoutingError
from r3patch.labels.model import RouterInfo
from r3patch.sessions._recompute import in_recompute

__all__ = ["Selection", "Tap", "TopkCall", "unseen"]

Selection = tuple[torch.Tensor, torch.Tensor]
"""Values and ids, both ``[num_tokens, topk]``."""


@dataclass(slots=True)
class TopkCall:
    """One call of Megatron's extension point, and Megatron's own answer to it."""

    scores: torch.Tensor
    topk: int
    num_groups: int | None
    group_topk: int | None
    compute_topk: Callable[..., Selection]

    def own(self) -> Selection:
        """What Megatron chooses."""
        return self.compute_topk(self.scores, self.topk, self.num_groups, self.group_topk)

    def own_ids(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The ids that Megatron chooses for these rows ``[n] int64``; None: for all.

        Detached, so that nothing is saved for backward, but in the grad mode of the caller, on
        which the order of the ids depends from 0.18 on.
        """
        scores = self.scores.detach()
        if rows is None:
            return self.compute_topk(scores, self.topk, self.num_groups, self.group_topk)[1]
        if not self.group_topk:
            return self.compute_topk(scores.index_select(0, rows), self.topk)[1]
        group_limited = _group_limited_topk()
        if group_limited is None:
            return self.own_ids().index_select(0, rows)
        # Megatron's closure holds the number of tokens of the whole call.
        return group_limited(
            scores=scores.index_select(0, rows),
            topk=self.topk,
            num_tokens=rows.shape[0],
            num_experts=scores.shape[1],
            num_groups=self.num_groups,
            group_topk=self.group_topk,
        )[1]


class Tap:
    """Lets Megatron choose, and counts: what a router in scope "mtp" gets."""

    def __init__(self, info: RouterInfo, chunk: int) -> None:
        self.info = info
        self.chunk = chunk
        self.layer_number = info.layer_number  # Megatron 0.19 writes it to `router_replay`
        self.set_aside = getattr(info.module, "router_replay", None)
        self.forward_calls = 0
        self.recompute_calls = 0
        self.rows_replayed = 0
        self.rows_live = 0
        self.rows_spread = 0

    # A cursor read by a compiled router would make it compile anew at every call.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., Selection] | None = None,
    ) -> Selection:
        """Megatron's extension point: values and ids ``[num_tokens, topk]`` for these scores."""
        assert default_compute_topk is not None
        return self.select(TopkCall(scores, topk, num_groups, group_topk, default_compute_topk))

    def select(self, call: TopkCall) -> Selection:
        """The answer to one call."""
        if in_recompute():
            self.recompute_calls += 1
        else:
            self.forward_calls += 1
            self.rows_live += call.scores.shape[0]
        return call.own()

    def refuse_second_manager(self) -> None:
        """Raise if a manager was switched on since the session was entered.

        Raises:
            ReplayError: its routes and the session's would contradict each other.
        """
        name = bridges.replaying(self.info.module, self.set_aside)
        if name is not None:
            raise ReplayError(
                f"{self.info.name}: the replay manager {name} was switched on during this session, "
                "and its routes are not used. Leave the session first, or put the manager to rest."
            )

    def refuse_capture(self, scores: torch.Tensor) -> None:
        """Raise if a CUDA graph captures this call: a graph of the user's own, in no config.

        Raises:
            UnsupportedRoutingError: each run of the graph would repeat the rows of its capture.
        """
        if scores.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UnsupportedRoutingError(
                f"{self.info.name}: a CUDA graph captures this router in a session, and would "
                "repeat the routes of its capture. Leave the router out of the graph, or capture "
                "outside of the session."
            )

    def counts(self) -> dict[str, int]:
        """The fields of ``RouterStats`` that this tap knows."""
        return {
            "forward_calls": self.forward_calls,
            "recompute_calls": self.recompute_calls,
            "rows_replayed": self.rows_replayed,
            "rows_live": self.rows_live,
            "rows_spread": self.rows_spread,
        }


_SELECTIVE = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)


_SEEN: AbstractContextManager[None] = contextlib.nullcontext()


def unseen() -> AbstractContextManager[Any]:
    """Hides what is inside from selective checkpoints.

    They cache the results of operations in forward and hand them out in recompute, in order: an
    operation that only one of the two runs would shift all that follow.
    Source: ``create_selective_checkpoint_contexts``, torch/utils/checkpoint.py, 2.4 and newer.
    """
    if any(isinstance(mode, _SELECTIVE) for mode in _get_current_dispatch_mode_stack()):
        return _disable_current_modes()
    return _SEEN


def _group_limited_topk() -> Callable[..., Selection] | None:
    try:
        from megatron.core.transformer.moe import moe_utils
    except ImportError:
        return None
    return getattr(moe_utils, "group_limited_topk", None)
