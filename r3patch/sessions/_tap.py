"""The tap: what a router's ``router_replay`` is while a session is open.

Megatron calls ``router_replay.get_replay_topk(scores, topk, num_groups, group_topk,
default_compute_topk)`` where it would take its own top-k, and computes the gate weights from the
ids it gets back. A tap answers that one call.
Source: ``topk_routing_with_score_function``, megatron/core/transformer/moe/moe_utils.py, 0.16+.

Shapes: ``scores [num_tokens, num_experts]`` float, ids ``[num_tokens, topk] int64``.

Nothing here waits for the device: no ``.item()``, no ``bool(tensor)``, no blocking copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from r3patch._errors import ReplayError
from r3patch.sessions._recompute import CallLog, in_backward
from r3patch.sessions._stream import layer_of

if TYPE_CHECKING:
    from r3patch.labels.model import RouterInfo
    from r3patch.sessions._stream import Column, Microbatch, RecordStream, ReplayStream

Selection = tuple[torch.Tensor, torch.Tensor]
Topk = Callable[..., Selection]


class Tap:
    """Lets Megatron choose, and counts: what a router in scope "mtp" gets."""

    def __init__(self, info: RouterInfo) -> None:
        self.info = info
        self.layer_number = info.layer_number  # Megatron 0.19 writes it to `router_replay`
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
        default_compute_topk: Topk | None = None,
    ) -> Selection:
        """Megatron's extension point: values and ids ``[num_tokens, topk]`` for these scores."""
        assert default_compute_topk is not None

        def live() -> Selection:
            return default_compute_topk(scores, topk, num_groups, group_topk)

        if in_backward():
            self.recompute_calls += 1
            return self.recompute(scores, live)
        self.forward_calls += 1
        return self.forward(scores, live)

    def counts(self) -> dict[str, int]:
        """The counted fields of ``RouterStats``. Measured ones wait for the device."""
        return {
            "forward_calls": self.forward_calls,
            "recompute_calls": self.recompute_calls,
            "rows_replayed": self.rows_replayed,
            "rows_live": self.rows_live,
            "rows_spread": self.rows_spread,
        }

    def forward(self, scores: torch.Tensor, live: Callable[[], Selection]) -> Selection:
        self.rows_live += scores.shape[0]
        return live()

    def recompute(self, scores: torch.Tensor, live: Callable[[], Selection]) -> Selection:
        return live()


class RecordTap(Tap):
    """Lets Megatron choose and hands the ids to the recording; a recompute records nothing."""

    def __init__(self, info: RouterInfo, stream: RecordStream) -> None:
        super().__init__(info)
        self.stream = stream

    def forward(self, scores: torch.Tensor, live: Callable[[], Selection]) -> Selection:
        values, ids = super().forward(scores, live)
        self.stream.record(layer_of(self.info), ids)
        return values, ids


class Rows(NamedTuple):
    """What one forward call routed: rows of a microbatch, and what Megatron itself chose."""

    microbatch: Microbatch
    start: int
    stop: int
    chosen: torch.Tensor | None  # [num_invalid, topk] int16: Megatron's choice for invalid rows
    live: torch.Tensor | None  # [num_tokens, topk] int16: Megatron's choice for all, if measured


@dataclass
class Measure:
    """Device-side sums over the valid rows that were compared with Megatron's own choice."""

    rows: int = 0
    differing: Any = 0  # rows whose set of experts differs
    shared: Any = 0  # experts in both sets, summed over rows
    recomputed: int = 0
    recompute_differing: Any = 0  # rows that Megatron would route otherwise in recompute

    def add(
        self, ids: torch.Tensor, live: torch.Tensor, valid: torch.Tensor | None
    ) -> torch.Tensor:
        """Compare two selections ``[num_tokens, topk]``; returns the rows that differ, bool."""
        shared = _shared(ids, live)
        differs = shared < ids.shape[1]
        if valid is not None:
            differs, shared = differs & valid, shared * valid
        self.differing = self.differing + differs.sum()
        self.shared = self.shared + shared.sum()
        return differs

    def counts(self) -> dict[str, int]:
        return {
            "rows_measured": self.rows,
            "rows_differing": int(self.differing),
            "experts_shared": int(self.shared),
            "recompute_rows_measured": self.recomputed,
            "recompute_rows_differing": int(self.recompute_differing),
        }

    def add_recompute(self, before: torch.Tensor, now: torch.Tensor) -> None:
        self.recomputed += now.shape[0]
        differs = _shared(before.to(now.dtype), now) < now.shape[1]
        self.recompute_differing = self.recompute_differing + differs.sum()


class ReplayTap(Tap):
    """Gives a main router the rows of the rollout: microbatch after microbatch, whole ones."""

    def __init__(
        self,
        info: RouterInfo,
        stream: ReplayStream,
        *,
        topk_sorts: Callable[[], bool],
        measure: bool,
    ) -> None:
        super().__init__(info)
        self.stream = stream
        self.topk_sorts = topk_sorts
        self.measure = Measure() if measure else None
        self.microbatch = 0  # the one that the next forward call takes,
        self.offset = 0  # and its first row: not 0 between the pieces of a chunked MLP
        self.calls: CallLog[Rows] = CallLog()

    def forward(self, scores: torch.Tensor, live: Callable[[], Selection]) -> Selection:
        microbatch, start, stop = self._take(scores.shape[0])
        column = self._column(microbatch)
        invalid = column.live_rows(start, stop, scores.device)
        own = live() if self.measure is not None or invalid is not None else None
        rows = self._remember(microbatch, start, stop, own, invalid)
        num_invalid = column.mask.num_invalid(start, stop)
        self.rows_replayed += stop - start - num_invalid
        if column.spread:
            self.rows_spread += num_invalid
        else:
            self.rows_live += num_invalid
        ids = self._ids(rows, invalid, scores.device)
        if own is None or self.measure is None:
            return self._select(scores, ids, None)
        self.measure.rows += stop - start - num_invalid
        differs = self.measure.add(ids, own[1], column.mask.valid(start, stop, scores.device))
        microbatch.note_differing(differs, start)
        return self._select(scores, ids, own)

    def recompute(self, scores: torch.Tensor, live: Callable[[], Selection]) -> Selection:
        rows = self.calls.recompute(self.info.name)
        if rows.stop - rows.start != scores.shape[0]:
            raise ReplayError(
                f"{self.info.name}: recompute asks for {scores.shape[0]} rows, its forward "
                f"call took {rows.stop - rows.start}. A checkpointed region must "
                "run the same calls twice."
            )
        column = self._column(rows.microbatch)
        invalid = column.live_rows(rows.start, rows.stop, scores.device)
        own = live() if rows.live is not None else None
        if own is not None and self.measure is not None and rows.live is not None:
            self.measure.add_recompute(rows.live, own[1])
        return self._select(scores, self._ids(rows, invalid, scores.device), own)

    def _column(self, microbatch: Microbatch) -> Column:
        return microbatch.column(layer_of(self.info))

    def counts(self) -> dict[str, int]:
        return super().counts() | (self.measure.counts() if self.measure is not None else {})

    def _take(self, num_tokens: int) -> tuple[Microbatch, int, int]:
        """The rows for the next forward call: a whole microbatch, or a piece of a chunked MLP."""
        microbatch = self.stream.get(self.microbatch, self.info.name)
        start, stop = self.offset, self.offset + num_tokens
        self.stream.check_size(microbatch, start, num_tokens, self.info.name)
        if stop == microbatch.num_tokens:
            self.microbatch, self.offset = self.microbatch + 1, 0
        else:
            self.offset = stop
        return microbatch, start, stop

    def _remember(
        self,
        microbatch: Microbatch,
        start: int,
        stop: int,
        own: Selection | None,
        invalid: torch.Tensor | None,
    ) -> Rows:
        """Keep what recompute needs: Megatron's choice is frozen, or a near-tie would flip it."""
        chosen = live = None
        if own is not None and invalid is not None:
            chosen = own[1].index_select(0, invalid).to(torch.int16)
        if own is not None and self.measure is not None:
            live = own[1].to(torch.int16)
        rows = Rows(microbatch, start, stop, chosen, live)
        self.stream.recomputable |= self.calls.forward(rows)
        return rows

    def _ids(self, rows: Rows, invalid: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """The ids ``[num_tokens, topk] int64``: the rollout's, and Megatron's where it has none."""
        column = self._column(rows.microbatch)
        ids = self.stream.on_device(rows.microbatch, device)[column.index, rows.start : rows.stop]
        ids = ids.to(torch.int64)
        if invalid is not None and rows.chosen is not None:
            ids = ids.index_copy(0, invalid, rows.chosen.to(torch.int64))
        return ids

    def _select(self, scores: torch.Tensor, ids: torch.Tensor, own: Selection | None) -> Selection:
        """Values and ids in the order in which Megatron would have put them.

        Megatron sums over a row's gate weights in the order of its ids, and engines return ids in
        any order: the same set in another order gives other bits.
        """
        if self.topk_sorts():
            order = scores.detach().gather(1, ids).argsort(dim=1, descending=True, stable=True)
            ids = ids.gather(1, order)
        if own is not None:
            same = _shared(ids, own[1]) == ids.shape[1]
            ids = torch.where(same.unsqueeze(1), own[1], ids)
        return scores.gather(1, ids), ids


def _shared(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many ids each row of ``a`` and ``b`` have in common: ``[num_tokens] int64``."""
    return (a.unsqueeze(2) == b.unsqueeze(1)).sum(dim=(1, 2))
