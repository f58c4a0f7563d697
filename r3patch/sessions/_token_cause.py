"""What went wrong, where rows belong to other tokens: the likely cause in words.

Pure arithmetic on two lists of token ids, on the host, after the fact. A cause is named where it
explains nearly all tokens that are compared; the rest is told by where it begins and ends.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

__all__ = ["cause"]

_MOST = 0.9  # of the tokens that are compared: a cause explains at least so many
_RUN = 4  # tokens in a row by which others are found
_ANCHORS = 8  # of such runs, to find a distance
_CANDIDATES = 16  # of distances or places that are tried: repeated tokens give many


def cause(
    rows: Tensor,
    ids: Tensor,
    others: Mapping[int, Tensor],
    *,
    number: int,
    batch: int,
    ranks: Sequence[Tensor] = (),
) -> str:
    """Name the microbatch, the first row that differs, both tokens, and the likely cause.

    Args:
        rows: ``[num_tokens] int32``, the tokens that the routes were computed for; -1: none.
        ids: ``[num_tokens] int32``, the tokens that the model got.
        others: the tokens of other microbatches, by number.
        number: the number of this one.
        batch: samples of the batch, as the model got it.
        ranks: under sequence parallelism what each rank's routers get, by its number.
    """
    differ = ((rows != ids) & (rows >= 0)).nonzero().squeeze(1)
    first, compared = int(differ[0]), int((rows >= 0).sum())
    width = batch if len(rows) % batch == 0 and len(rows) >= _RUN * batch else 1
    pairs = zip(_columns(rows, width), _columns(ids, width), strict=True)
    samples = [_Pair(*pair) for pair in pairs]
    named = (
        _another_microbatch(ids, others)
        or _another_rank(rows, ranks)
        or _another_order_of_the_batch(rows, ids, width)
        or _padding(rows, ids)
        or _shift(samples)
        or _order_of_the_pack(rows, ids, width)
        or _late(samples)
        or _other(samples)
    )
    return (
        f"microbatch {number}, row {first}: its routes are those of token {int(rows[first])}, the "
        f"model got token {int(ids[first])}; {len(differ)} of {compared} rows differ. {named}"
    )


class _Pair:
    """The rows and ids of a row of the batch: a sample, or a pack of them."""

    def __init__(self, rows: Tensor, ids: Tensor) -> None:
        self.rows, self.ids = rows, ids
        self.compared = rows >= 0
        self.differ = ((rows != ids) & self.compared).nonzero().squeeze(1)

    @property
    def first(self) -> int:
        return int(self.differ[0])

    @property
    def last(self) -> int:
        return int(self.differ[-1])

    @property
    def agree_before(self) -> int:
        """Tokens of the same sample that agree before the first that does not."""
        gaps = (~self.compared[: self.first]).nonzero()
        return self.first - (int(gaps[-1]) + 1 if len(gaps) else 0)

    @property
    def agree_at_the_start(self) -> int:
        return int(self.compared[: self.first].sum())


def _columns(values: Tensor, width: int) -> list[Tensor]:
    return [column.contiguous() for column in values.view(-1, width).unbind(1)]


def _another_microbatch(ids: Tensor, others: Mapping[int, Tensor]) -> str:
    for number, tokens in others.items():
        if tokens.shape == ids.shape and _explains(tokens, ids):
            return (
                f"The model got the tokens of microbatch {number}: routes and batches are in "
                "another order."
            )
    return ""


def _another_rank(rows: Tensor, ranks: Sequence[Tensor]) -> str:
    for rank, ids in enumerate(ranks):
        if _explains(rows, ids):
            return (
                f"The rows are those of tensor-parallel rank {rank}: place them by a Layout with "
                "this rank's tp_rank."
            )
    return ""


def _another_order_of_the_batch(rows: Tensor, ids: Tensor, batch: int) -> str:
    if batch < 2:
        return ""
    if _explains(rows.view(batch, -1).t().flatten(), ids):
        return (
            "The rows are in batch order, sample after sample; Megatron's router gets [s, b]. "
            "Place them by Layout(packed=False, ...).place."
        )
    order: list[int] = []
    samples = rows.view(-1, batch)
    for one in ids.view(-1, batch).unbind(1):
        same = ((samples == one.unsqueeze(1)) & (samples >= 0)).sum(0)
        fits = ((samples >= 0).sum(0) * _MOST <= same) & (same > 0)
        fits[order] = False
        if not fits.any():
            return ""
        order.append(int(fits.nonzero()[0]))
    if order == sorted(order):
        return ""
    return f"The model got the samples in the order {_listed(order)}: place them in the batch's."


def _padding(rows: Tensor, ids: Tensor) -> str:
    instead = ids[(rows != ids) & (rows >= 0)]
    if len(instead) < 2 or len(instead.unique()) > 1:
        return ""
    return (
        f"All of them are token {int(instead[0])} there: is it padding? Where a sample was cut "
        "after decoding, cut the routes too (routes[:n])."
    )


def _shift(samples: list[_Pair]) -> str:
    """All rows of a sample are elsewhere, from the first on."""
    wrong = [s for s in samples if len(s.differ)]
    if any(s.agree_at_the_start >= _RUN for s in wrong):
        return ""
    found = []
    for sample in samples:
        distance = _distance(sample.rows, sample.ids) if len(sample.differ) else 0
        if len(sample.differ) and not distance:
            return ""
        found.append(distance)
    if len(set(found)) == 1:
        return (
            f"The rows are shifted by {found[0] * len(samples)}: padding on the wrong side, or a "
            "wrong start."
        )
    return (
        f"The samples' rows are shifted by {_listed(found)} tokens: the batch has its padding on "
        "another side, or its prompts padded on the left (padding_side and prompt_width of Layout)."
    )


def _late(samples: list[_Pair]) -> str:
    """Rows are elsewhere from some token of a sample on."""
    wrong = [(n, s) for n, s in enumerate(samples) if len(s.differ)]
    number, pair = max(wrong, key=lambda one: len(one[1].differ))
    part = slice(pair.first, pair.last + 1)
    late = -_distance(pair.rows[part], pair.ids[part])
    if not late:
        return ""
    to_the_end = int(pair.compared[pair.last + 1 :].sum()) < _RUN
    where = f"row {pair.first * len(samples) + number}"
    if to_the_end:
        where = f"From {where} on"
        why = (
            "a sample was cut or extended after decoding, or the padding between samples is "
            "another one"
        )
    else:
        where = f"From {where} to row {_row(samples, number)}"
        why = "a history was rendered anew, or a sample was cut or extended after decoding"
    return (
        f"{where} the rows{_of_sample(samples, number)} are {abs(late)} "
        f"{'late' if late > 0 else 'early'}: {why}. Place the samples as they are trained."
    )


def _row(samples: list[_Pair], number: int) -> int:
    """The last row of a sample that differs, in the router's order."""
    return samples[number].last * len(samples) + number


def _of_sample(samples: list[_Pair], number: int) -> str:
    return f" of sample {number}" if len(samples) > 1 else ""


def _order_of_the_pack(rows: Tensor, ids: Tensor, width: int) -> str:
    """Samples end where a row is not compared: their last tokens were never fed."""
    if width > 1:
        return ""
    ends = [-1, *(rows < 0).nonzero().squeeze(1).tolist(), len(rows)]
    places: list[int] = []
    for before, end in itertools.pairwise(ends):
        if end - before <= _RUN:
            continue
        found = _places(rows[before + 1 : end], ids)
        if not found:
            return ""
        places.append(found[0])  # equal samples share a place, and keep their order
    order = sorted(range(len(places)), key=places.__getitem__)
    if order == sorted(order):
        return ""
    return (
        f"The model got the samples in the order {_listed(order)}: join and place them in that "
        "order."
    )


def _other(samples: list[_Pair]) -> str:
    """Tokens that are nowhere near: say what agrees."""
    wrong = {number: s for number, s in enumerate(samples) if len(s.differ)}
    differ = sum(len(s.differ) for s in wrong.values())
    if differ >= _MOST * sum(int(s.compared.sum()) for s in samples):
        what = (
            "Nearly no row is of the token that the model got: another rank's routes, other "
            "samples, or an older batch."
        )
    else:
        first = min(s.first * len(samples) + number for number, s in wrong.items())
        last = max(_row(samples, number) for number in wrong)
        where = f"in rows {first} to {last}"
        if len(samples) > 1:
            where += f", of samples {_listed(list(wrong))}"
        agree = min(s.agree_before for s in wrong.values())
        what = (
            f"Other tokens {where}, after {agree} that agree: the routes of another response to "
            "the same prompt, or a history that was rendered anew."
            if agree >= _RUN
            else f"Other tokens {where}: the routes of other samples."
        )
    return (
        f"{what} If the trainer replaces input tokens on purpose, open the session with "
        'tokens="ignore".'
    )


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:_CANDIDATES]))
    return f"[{shown}{', ...' if len(numbers) > _CANDIDATES else ''}]"


def _explains(rows: Tensor, ids: Tensor, least: float = 1) -> bool:
    """Whether these rows are the ids' where they are compared, but for a few."""
    compared = rows >= 0
    total = int(compared.sum())
    return total >= least and int((rows[compared] == ids[compared]).sum()) >= _MOST * total


def _distance(rows: Tensor, ids: Tensor) -> int:
    """By how many rows the ids are behind (above 0) or before the rows; 0: by no number.

    Runs of the rows are looked up in the ids, and what most of them say is tried: that is linear
    in the tokens, and finds any distance.
    """
    if len(rows) < _RUN:
        return 0
    runs = (rows.unfold(0, _RUN, 1) >= 0).all(1).nonzero().squeeze(1).tolist()
    votes: Counter[int] = Counter()
    for start in runs[:: max(1, len(runs) // _ANCHORS)]:
        votes.update((_starts(rows[start : start + _RUN], ids) - start).tolist())
    least = max(_RUN, int((rows >= 0).sum()) / 4)
    for distance, _ in votes.most_common(_CANDIDATES):
        if distance > 0 and _explains(rows[:-distance], ids[distance:], least):
            return distance
        if distance < 0 and _explains(rows[-distance:], ids[:distance], least):
            return distance
    return 0


def _places(sample: Tensor, ids: Tensor) -> list[int]:
    """Where the sample begins in the ids."""
    starts = _starts(sample[:_RUN], ids)
    fitting = starts[starts + len(sample) <= len(ids)].tolist()
    return [at for at in fitting[:_CANDIDATES] if _explains(sample, ids[at : at + len(sample)])]


def _starts(run: Tensor, ids: Tensor) -> Tensor:
    if len(run) < _RUN or len(ids) < _RUN:
        return ids.new_empty(0)
    return (ids.unfold(0, len(run), 1) == run).all(1).nonzero().squeeze(1)
