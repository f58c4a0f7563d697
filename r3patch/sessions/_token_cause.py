"""What went wrong, where rows belong to other tokens: the likely cause in words.

Pure arithmetic on two lists of token ids, on the host, after the fact.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from torch import Tensor

__all__ = ["cause"]

_MOST = 0.9  # of the tokens that are compared: a cause explains at least so many
_FARTHEST = 256  # rows by which tokens are looked for
_RUN = 4  # tokens in a row that tell a sample


def cause(
    rows: Tensor, ids: Tensor, others: Mapping[int, Tensor], *, number: int, batch: int
) -> str:
    """Name the microbatch, the first row that differs, both tokens, and the likely cause.

    Args:
        rows: ``[num_tokens] int32``, the tokens that the routes were computed for; -1: none.
        ids: ``[num_tokens] int32``, the tokens that the model got.
        others: the tokens of other microbatches, by number.
        number: the number of this one.
        batch: samples of the batch, as the model got it.
    """
    differ = ((rows != ids) & (rows >= 0)).nonzero().squeeze(1)
    first, compared = int(differ[0]), int((rows >= 0).sum())
    causes = (
        _another_microbatch(ids, others),
        _another_order_of_the_batch(rows, ids, batch),
        _padding(rows, ids),
        _shift(rows, ids),
        _late_from(rows, ids, first),
        _order_of_samples(rows, ids),
    )
    return (
        f"microbatch {number}, row {first}: its routes are those of token {int(rows[first])}, the "
        f"model got token {int(ids[first])}; {len(differ)} of {compared} rows differ. "
        f"{next(filter(None, causes), _OTHER)}"
    )


_OTHER = (
    "Other tokens: another sample's or another rank's routes, an older batch, or a history that "
    "was rendered anew. If the trainer replaces input tokens on purpose, open the session with "
    'tokens="ignore".'
)


def _another_microbatch(ids: Tensor, others: Mapping[int, Tensor]) -> str:
    for number, tokens in others.items():
        if tokens.shape == ids.shape and _explains(tokens, ids):
            return (
                f"The model got the tokens of microbatch {number}: routes and batches are in "
                "another order."
            )
    return ""


def _another_order_of_the_batch(rows: Tensor, ids: Tensor, batch: int) -> str:
    if batch < 2 or len(rows) % batch:
        return ""
    if _explains(rows.view(batch, -1).t().flatten(), ids):
        return (
            "The rows are in batch order, sample after sample; Megatron's router gets [s, b]. "
            "Place them by Layout(packed=False, ...).place."
        )
    samples, got = rows.view(-1, batch).unbind(1), ids.view(-1, batch).unbind(1)
    order = [next((i for i, s in enumerate(samples) if _explains(s, one)), -1) for one in got]
    if sorted(order) == list(range(batch)):
        return f"The model got the samples in the order {order}: place them in the batch's."
    return ""


def _padding(rows: Tensor, ids: Tensor) -> str:
    instead = ids[(rows != ids) & (rows >= 0)]
    if len(instead) < 2 or len(instead.unique()) > 1:
        return ""
    return (
        f"All of them are token {int(instead[0])} there: is it padding? Where a sample was cut "
        "after decoding, cut the routes too (routes[:n])."
    )


def _shift(rows: Tensor, ids: Tensor) -> str:
    distance = _distance(rows, ids, len(rows) // 2)
    if not distance:
        return ""
    return f"The rows are shifted by {distance}: padding on the wrong side, or a wrong start."


def _late_from(rows: Tensor, ids: Tensor, first: int) -> str:
    distance = -_distance(rows[first:], ids[first:], len(rows) - first - _RUN)
    if not distance:
        return ""
    return (
        f"From row {first} on the rows are {distance} late: a sample was cut or extended after "
        "decoding, or the padding between samples is another one. Place the samples as they are "
        "trained."
    )


def _explains(rows: Tensor, ids: Tensor) -> bool:
    """Whether these rows are the ids' where they are compared, but for a few."""
    compared = rows >= 0
    total = int(compared.sum())
    return total > 0 and int((rows[compared] == ids[compared]).sum()) >= _MOST * total


def _distance(rows: Tensor, ids: Tensor, farthest: int) -> int:
    """By how many rows the ids are behind (above 0) or before the rows; 0: by no number."""
    for distance in range(1, min(_FARTHEST, farthest)):
        if _explains(rows[:-distance], ids[distance:]):
            return distance
        if _explains(rows[distance:], ids[:-distance]):
            return -distance
    return 0


def _order_of_samples(rows: Tensor, ids: Tensor) -> str:
    """The runs of the rows in the order in which the model got them, numbered as the rows are."""
    pieces = _runs(rows.tolist(), ids.tolist())
    covered = sum(length for _, length in pieces)
    order = sorted(range(len(pieces)), key=lambda piece: pieces[piece][0])
    numbers = [order.index(piece) for piece in range(len(pieces))]
    few = len(pieces) <= max(2, len(ids) // (2 * _RUN))
    if not few or numbers == sorted(numbers) or covered < _MOST * int((rows >= 0).sum()):
        return ""
    return f"The model got the samples in the order {numbers}: join and place them in that order."


def _runs(rows: list[int], ids: list[int]) -> list[tuple[int, int]]:
    """The runs of ``rows`` that are in ``ids``, as these have them: where, and how long."""
    starts: dict[tuple[int, ...], int] = {}
    for index in range(len(rows) - _RUN + 1):
        starts.setdefault(tuple(rows[index : index + _RUN]), index)
    runs: list[tuple[int, int]] = []
    at = 0
    while at + _RUN <= len(ids):
        start = starts.get(tuple(ids[at : at + _RUN]))
        if start is None:
            at += 1
            continue
        same = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(rows[start:], ids[at:], strict=False)
        )
        length = sum(1 for _ in same)
        runs.append((start, length))
        at += length
    return runs
