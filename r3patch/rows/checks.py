"""What a row must be: ids that are distinct and in range, in the narrowest dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from r3patch.rows.arrays import signed

# Rows are checked in blocks of about this many ids: a block and its scratch stay in the cache.
_BLOCK_IDS = 1 << 18


def stored_dtype(num_experts: int) -> torch.dtype:
    """The narrowest dtype that Megatron-side indexing can widen again: uint8, else int16."""
    return torch.uint8 if num_experts <= 256 else torch.int16


def narrow(
    wide: Tensor, into: Tensor, num_experts: int, columns: slice | Tensor = slice(None)
) -> Tensor | None:
    """Narrows ids to the stored dtype and finds the rows that cannot be routes.

    Args:
        wide: ``[num_tokens, axis, topk]``, any integer dtype.
        into: ``[num_tokens, num_layers, topk]``, receives the ids of ``columns``.
        columns: which of ``axis``, a slice or int64 positions.

    Returns:
        The rows with an id out of range or a repeated id, ``[num_tokens, num_layers]`` bool;
        None if there are none.
    """
    num_tokens, num_layers, topk = into.shape
    bad: Tensor | None = None
    step = max(1, _BLOCK_IDS // max(1, num_layers * topk))
    for start in range(0, num_tokens if num_layers else 0, step):
        rows = slice(start, start + step)
        block = signed(wide[rows])[:, columns]
        into[rows] = block
        found = _bad_rows(block, into[rows], num_experts)
        if found is not None:
            if bad is None:
                bad = torch.zeros(num_tokens, num_layers, dtype=torch.bool, device="cpu")
            bad[rows] = found
    return bad


def _bad_rows(wide: Tensor, ids: Tensor, num_experts: int) -> Tensor | None:
    # Compared in Python and in int64: torch would wrap num_experts=256 to 0 beside uint8 ids.
    least, greatest = (int(bound) for bound in wide.aminmax())
    repeated = _repeated(ids)
    if least >= 0 and greatest < num_experts:
        return repeated
    wide = wide.to(torch.int64)
    outside = ((wide < 0) | (wide >= num_experts)).any(-1)
    return outside if repeated is None else outside | repeated


def _repeated(ids: Tensor) -> Tensor | None:
    """Rows that hold an id twice, bool of the leading shape; None if there are none."""
    topk = ids.shape[-1]
    # [topk, rows]: comparing whole columns runs at the speed of memory, sorting rows does not.
    columns = ids.reshape(-1, topk).t().contiguous()
    repeated: Tensor | None = None
    for distance in range(1, topk):
        equal = columns[distance:] == columns[:-distance]
        if equal.numel() and equal.view(torch.uint8).amax():  # several times faster than any()
            found = equal.any(0)
            repeated = found if repeated is None else repeated | found
    return None if repeated is None else repeated.view(ids.shape[:-1])
