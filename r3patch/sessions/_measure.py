"""How far the rollout's experts are from those that Megatron would have chosen itself.

Everything is summed on the device; the host reads the sums when somebody asks for the figures.
"""

from __future__ import annotations

import threading

import torch

__all__ = ["Measure", "TokenFigures", "shared_experts"]


def shared_experts(a: torch.Tensor, b: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many ids each row of ``a`` and ``b [num_tokens, topk] int64`` have in common.

    Returns:
        ``[num_tokens] int64``.
    """
    chosen = torch.zeros(a.shape[0], num_experts, dtype=torch.uint8, device=a.device)
    return chosen.scatter_(1, a, 1).gather(1, b).sum(1)


class TokenFigures:
    """Which tokens of one microbatch differ in at least one layer.

    Args:
        any_valid: ``[num_tokens] bool`` on the host: tokens with a route in some layer.
    """

    def __init__(self, any_valid: torch.Tensor) -> None:
        self._any_valid = any_valid
        self._differing: torch.Tensor | None = None  # [num_tokens] bool on the device

    def add(self, differs: torch.Tensor, start: int) -> None:
        """Note what one layer says of tokens ``start : start + len(differs)``."""
        if self._differing is None:
            self._differing = differs.new_zeros(len(self._any_valid))
        self._differing[start : start + len(differs)] |= differs

    def codes(self) -> torch.Tensor:
        """``[num_tokens] uint8``: 0 nothing measured, 1 as Megatron would, 2 differs in a layer."""
        codes = self._any_valid.to(torch.uint8)
        return codes if self._differing is None else codes + self._differing.cpu()


class Measure:
    """The sums of one router over the rows that were compared with Megatron's own choice."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._rows = self._recompute_rows = 0
        self._differing: torch.Tensor | int = 0
        self._shared: torch.Tensor | int = 0
        self._recompute_differing: torch.Tensor | int = 0
        self._lock = threading.Lock()  # backward passes may run side by side

    def forward(
        self, ids: torch.Tensor, own: torch.Tensor, gaps: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare a forward call's rows with Megatron's choice, both ``[num_tokens, topk]``.

        Args:
            gaps: ``[num_gaps] int64``, rows that are not compared.

        Returns:
            The rows whose set is the same, and those that differ and were compared, both
            ``[num_tokens] bool``.
        """
        shared = shared_experts(own, ids, self._num_experts)
        same = shared == ids.shape[1]
        differs = ~same
        if gaps is not None:
            differs = differs.index_fill(0, gaps, False)
            shared = shared.index_fill(0, gaps, 0)
        self._rows += ids.shape[0] - (0 if gaps is None else gaps.shape[0])
        self._differing = self._differing + differs.sum()
        self._shared = self._shared + shared.sum()
        return same, differs

    def recompute(
        self, ids: torch.Tensor, own: torch.Tensor, own_in_forward: torch.Tensor
    ) -> torch.Tensor:
        """Compare Megatron's choice in a recompute with that in its forward call.

        Returns:
            ``[num_tokens] bool``: the rows of ``ids`` that are Megatron's set now.
        """
        again = shared_experts(own, own_in_forward.to(torch.int64), self._num_experts)
        with self._lock:
            self._recompute_rows += own.shape[0]
            moved = (again < own.shape[1]).sum()
            self._recompute_differing = self._recompute_differing + moved
        return shared_experts(own, ids, self._num_experts) == ids.shape[1]

    def counts(self) -> dict[str, int]:
        """The measured fields of ``RouterStats``. Waits for the device."""
        return {
            "rows_measured": self._rows,
            "rows_differing": int(self._differing),
            "experts_shared": int(self._shared),
            "recompute_rows_measured": self._recompute_rows,
            "recompute_rows_differing": int(self._recompute_differing),
        }
