"""Experts for rows that have no routes, so that padding loads none of them more than another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r3patch._errors import RoutesError


def spread_rows(
    num_rows: int, topk: int, num_experts: int, *, first: int = 0, ep_size: int = 1
) -> Tensor:
    """Rows of distinct experts that go round all experts and all expert-parallel ranks.

    Args:
        num_rows: rows to fill.
        topk: experts per row, at most ``num_experts``.
        num_experts: experts of the layer; Megatron gives every expert-parallel rank a block of
            ``num_experts / ep_size`` neighbours.
        first: rows that were filled before, to go on where they ended.
        ep_size: expert-parallel ranks.

    Returns:
        ``[num_rows, topk]`` int64. For any number of rows the loads of two experts differ by 1 at
        most, and so do the loads of two ranks.

    Raises:
        RoutesError: ``topk`` is above ``num_experts``, or ``ep_size`` does not divide it.
    """
    if not 1 <= topk <= num_experts:
        raise RoutesError(f"topk is {topk} with {num_experts} experts: a row has distinct experts.")
    if ep_size < 1 or num_experts % ep_size:
        raise RoutesError(f"ep_size={ep_size} does not divide num_experts={num_experts}.")
    # The n-th pick goes to rank n % ep_size. A round of num_experts picks takes every expert once,
    # and a row is shorter than a round, so its experts are distinct.
    pick = torch.arange(first * topk, (first + num_rows) * topk, device="cpu") % num_experts
    block = num_experts // ep_size
    return (pick % ep_size * block + pick // ep_size).view(num_rows, topk)


def spread_missing(
    rows: Tensor, missing: Sequence[Tensor | None], num_experts: Sequence[int], *, ep_size: int = 1
) -> None:
    """Give the rows without routes distinct experts in turn, in place.

    Args:
        rows: ``[num_layers, num_tokens, topk]``, of any integer dtype.
        missing: for each layer the positions ``[n] int64`` of such rows; None: it has none.
        num_experts: of each layer.
        ep_size: expert-parallel ranks.
    """
    for index, positions in enumerate(missing):
        if positions is not None:
            count = len(positions)
            fill = spread_rows(
                count, rows.shape[2], num_experts[index], first=index * count, ep_size=ep_size
            )
            rows[index, positions] = fill.to(rows.dtype)
