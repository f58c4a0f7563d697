"""The cause that is named where rows belong to other tokens: faults x batches x repetitions."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from r3patch.sessions._token_cause import cause

VOCABULARY = {"distinct": 100_000, "repeated": 40}
LENGTHS = (30, 41, 26, 37)
WIDTH = 48


def draw(length: int, vocabulary: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (length,), generator=generator, dtype=torch.int32)


def samples(vocabulary: int, seed: int = 0) -> list[Tensor]:
    return [draw(length, vocabulary, seed + i) for i, length in enumerate(LENGTHS)]


def packed(parts: list[Tensor], *, valid: bool) -> Tensor:
    """One sample after the other; `valid`: with the rows that are not compared."""
    rows = torch.cat([_fed(part) if valid else part for part in parts])
    return torch.cat([rows, torch.full((160 - len(rows),), -1 if valid else 0, dtype=torch.int32)])


def padded(parts: list[Tensor], *, valid: bool, left: bool = False) -> Tensor:
    whole = torch.full((len(parts), WIDTH), -1 if valid else 0, dtype=torch.int32)
    for row, part in zip(whole, parts, strict=True):
        start = WIDTH - len(part) if left else 0
        row[start : start + len(part)] = _fed(part) if valid else part
    return whole.t().flatten()


def _fed(part: Tensor) -> Tensor:
    return torch.cat([part[:-1], part.new_tensor([-1])])


def without(part: Tensor, start: int, stop: int) -> Tensor:
    return torch.cat([part[:start], part[stop:]])


def told(rows: Tensor, ids: Tensor, batch: int) -> str:
    return cause(rows, ids, {}, number=3, batch=batch)


Fault = Callable[[list[Tensor]], tuple[Tensor, Tensor, int]]
FAULTS: dict[str, tuple[Fault, str]] = {
    "packed, another order": (
        lambda s: (packed([s[i] for i in (2, 0, 3, 1)], valid=True), packed(s, valid=False), 1),
        r"the samples in the order \[1, 3, 0, 2\]",
    ),
    "padded, another order": (
        lambda s: (padded([s[i] for i in (2, 0, 3, 1)], valid=True), padded(s, valid=False), 4),
        r"the samples in the order \[1, 3, 0, 2\]",
    ),
    "packed, cut": (
        lambda s: (
            packed(s, valid=True),
            packed([without(s[0], 12, 15), *s[1:]], valid=False),
            1,
        ),
        r"From row 12 on the rows are 3 late",
    ),
    "padded, cut": (
        lambda s: (
            padded(s, valid=True),
            padded([s[0], without(s[1], 12, 15), *s[2:]], valid=False),
            4,
        ),
        r"From row 49 on the rows of sample 1 are 3 late",
    ),
    "packed, extended": (
        lambda s: (
            packed([without(s[0], 12, 15), *s[1:]], valid=True),
            packed(s, valid=False),
            1,
        ),
        r"From row 12 on the rows are 3 early",
    ),
    "packed, a history with other tokens": (
        lambda s: (
            packed([torch.cat([s[0][:8], s[0][12:24], s[0][20:]])[:30], *s[1:]], valid=True),
            packed([torch.cat([s[0][:20], s[0][20:]]), *s[1:]], valid=False),
            1,
        ),
        r"From row 8 to row 1\d the rows are 4 early",
    ),
    "packed, shifted": (
        lambda s: (packed(s, valid=True).roll(1), packed(s, valid=False), 1),
        r"shifted by -1: ",
    ),
    "padded, shifted": (
        lambda s: (padded(s, valid=True).roll(-4), padded(s, valid=False), 4),
        r"shifted by 4: ",
    ),
    "padded, the other side": (
        lambda s: (padded(s, valid=True), padded(s, valid=False, left=True), 4),
        r"shifted by \[18, 7, 22, 11\] tokens: .*padding_side",
    ),
    "padded, batch order": (
        lambda s: (
            padded(s, valid=True).view(-1, 4).t().flatten(),
            padded(s, valid=False),
            4,
        ),
        r"in batch order, sample after sample",
    ),
    "packed, a sibling": (
        lambda s: (
            packed([torch.cat([s[0][:12], s[1][: len(s[0]) - 12]]), *s[1:]], valid=True),
            packed(s, valid=False),
            1,
        ),
        r"Other tokens in rows 1\d to 2\d, after 1\d that agree: .* another response",
    ),
    "padded, a sibling": (
        lambda s: (
            padded([torch.cat([s[0][:12], s[1][: len(s[0]) - 12]]), *s[1:]], valid=True),
            padded(s, valid=False),
            4,
        ),
        r"Other tokens in rows \d+ to \d+, of samples \[0\], after 1\d that agree",
    ),
    "packed, other tokens": (
        lambda s: (packed(samples(10_000, 90), valid=True), packed(s, valid=False), 1),
        r"Nearly no row is of the token .* an older batch",
    ),
    "padded, cut to padding": (
        lambda s: (padded(s, valid=True), padded([s[0][:20], *s[1:]], valid=False), 4),
        r"All of them are token 0 there: is it padding\?",
    ),
}


@pytest.mark.parametrize("vocabulary", VOCABULARY)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_cause_is_named(fault: str, vocabulary: str) -> None:
    """Whatever the batch, and where tokens come again and again, too."""
    make, text = FAULTS[fault]
    rows, ids, batch = make(samples(VOCABULARY[vocabulary]))
    message = told(rows, ids, batch)
    assert message.startswith("microbatch 3, row ")
    assert re.search(text, message), message


@pytest.mark.parametrize("fault", FAULTS)
def test_another_microbatch_goes_before_all(fault: str) -> None:
    """Where the model got what another microbatch's rows are for, that is the cause."""
    rows, ids, batch = FAULTS[fault][0](samples(VOCABULARY["distinct"]))
    other = draw(len(rows), 100_000, 50)
    message = cause(rows, ids, {0: other, 1: ids}, number=3, batch=batch)
    assert "The model got the tokens of microbatch 1" in message


@pytest.mark.parametrize("batch", [1, 4])
def test_another_rank_is_named(batch: int) -> None:
    """Under sequence parallelism the parts of the other ranks are at hand."""
    parts = samples(100_000)
    rows, ids = padded(parts, valid=True).chunk(2), padded(parts, valid=False).chunk(2)
    message = cause(rows[1], ids[0], {}, number=0, batch=batch, ranks=ids)
    assert "those of tensor-parallel rank 1" in message


@pytest.mark.parametrize("size", range(1, 7))
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_few_tokens_have_a_text_too(size: int, batch: int) -> None:
    """Microbatches smaller than any run of tokens, of one token repeated or of all others."""
    zeros, ones = torch.zeros(size, dtype=torch.int32), torch.ones(size, dtype=torch.int32)
    some = torch.arange(size, dtype=torch.int32)
    for rows, ids in [(zeros, ones), (some, zeros - 1), (some, some.flip(0) + 1), (ones, some)]:
        if (rows != ids).any():
            assert cause(rows, ids, {}, number=3, batch=batch).startswith("microbatch 3, row ")


@pytest.mark.parametrize("tokens", ["distinct", "one token", "two tokens", "runs"])
@pytest.mark.parametrize("batch", [1, 8, 512, 32_768])
def test_many_tokens_take_no_time(tokens: str, batch: int) -> None:
    """32,768 tokens, whatever they are and however they are batched: linear, not quadratic."""
    count = 32_768
    rows = {
        "distinct": torch.randperm(count, generator=torch.Generator().manual_seed(0)),
        "one token": torch.zeros(count),
        "two tokens": torch.arange(count) % 2,
        "runs": torch.arange(count) // 64 % 5,
    }[tokens].int()
    ids = rows.roll(1000) + (torch.arange(count) % 3 == 0).int()
    rows[::512] = -1
    begin = time.thread_time()
    told(rows, ids, batch)
    assert time.thread_time() - begin < 2.0


def test_a_part_of_this_microbatch_is_not_another_one() -> None:
    """A shorter microbatch that begins alike does not hold what the model got."""
    ids = packed(samples(100_000), valid=False)
    rows = packed([draw(length, 100_000, 77 + length) for length in LENGTHS], valid=True)
    assert "tokens of microbatch" not in cause(rows, ids, {1: ids[:20]}, number=3, batch=1)


def test_equal_samples_of_a_batch_have_places_of_their_own() -> None:
    """Two responses to a prompt can be the same tokens."""
    one, other = draw(30, 100_000, 1), draw(41, 100_000, 2)
    rows = padded([other, one, one], valid=True)
    text = told(rows, padded([one, one, other], valid=False), 3)
    assert "the samples in the order [1, 2, 0]" in text
    rows = packed([one, other, one], valid=True)
    text = told(rows, packed([one, one, other], valid=False), 1)
    assert "the samples in the order [0, 2, 1]" in text


def test_one_token_is_no_padding() -> None:
    """That all differing rows have the same token means nothing where there is one."""
    parts = samples(100_000)
    ids = packed(parts, valid=False)
    ids[20] = 0
    assert "padding?" not in told(packed(parts, valid=True), ids, 1)
