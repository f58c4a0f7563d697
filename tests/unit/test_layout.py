"""Layout against a token-by-token oracle, written from the definition of each kind of batch."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from microbatches import Case, layouts

from r3patch import Layout, Routes, RoutesError

PAD = None
TOPK, EXPERTS, LAYERS = 2, 300, (2, 5)


def sample(number: int, length: int) -> Routes:
    """Routes whose rows tell their sample and token; the last row is invalid."""
    token = torch.arange(length).view(-1, 1, 1)
    base = (number * 64 + token) % (EXPERTS - 1)
    experts = torch.cat([base, base + 1], dim=2).expand(-1, len(LAYERS), -1).clone()
    experts[:, 1] = experts[:, 1].flip(-1)
    valid = torch.ones(length, dtype=torch.bool)
    valid[-1:] = False
    return Routes(experts, LAYERS, valid, num_experts=EXPERTS)


def oracle(layout: Layout, lengths: list[int]) -> list[tuple[int, int] | None]:
    """(sample, token) of each row of this rank, PAD for padding, one token at a time."""
    cp, zigzag = layout.cp_size, layout.cp_order == "zigzag" and layout.cp_size > 1

    def rank_of(position: int, length: int) -> int:
        if not zigzag:
            return position // (length // cp)
        chunk = position // (length // (2 * cp))
        return min(chunk, 2 * cp - 1 - chunk)

    mine: list[tuple[int, int] | None] = []
    if layout.packed:
        unit = math.lcm(layout.align, 2 * cp) if zigzag else layout.align
        row: list[tuple[int, int] | None] = []
        for number, length in enumerate(lengths):
            whole: list[tuple[int, int] | None] = [(number, t) for t in range(length)]
            while len(whole) % unit:
                whole.append(PAD)
            if zigzag:
                mine += [x for i, x in enumerate(whole) if rank_of(i, len(whole)) == layout.cp_rank]
            row += whole
        tail = 0
        while (len(row) + tail) % layout.pad_to_multiple:
            tail += 1
        if zigzag:
            mine += [PAD] * (tail // cp)
        else:
            row += [PAD] * tail
            mine = [x for i, x in enumerate(row) if rank_of(i, len(row)) == layout.cp_rank]
    else:
        size = layout.seq_length
        assert size is not None
        for position in range(size):
            if rank_of(position, size) != layout.cp_rank:
                continue
            for number, length in enumerate(lengths):
                shift = size - length if layout.padding_side == "left" else 0
                inside = 0 <= position - shift < length
                mine.append((number, position - shift) if inside else PAD)
    if layout.sequence_parallel:
        part = len(mine) // layout.tp_size
        mine = mine[layout.tp_rank * part : (layout.tp_rank + 1) * part]
    return mine


@settings(max_examples=300, deadline=None)
@given(layouts())
def test_place_puts_every_token_where_the_definition_does(case: Case) -> None:
    """Rows, validity and layers of every placed row are those of the oracle's token."""
    layout, lengths = case
    samples = [sample(number, length) for number, length in enumerate(lengths)]
    placed = layout.place(samples)
    expected = oracle(layout, lengths)
    assert placed.num_tokens == len(expected)
    assert (placed.layers, placed.num_experts) == (LAYERS, EXPERTS)
    for row, where in enumerate(expected):
        known = where is not None and where[1] < lengths[where[0]] - 1
        valid = placed.valid is None or bool(placed.valid[row].all())
        assert valid == known
        want = torch.zeros(len(LAYERS), TOPK)
        if known and where is not None:
            want = samples[where[0]].experts[where[1]]
        assert placed.experts[row].tolist() == want.tolist()


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_place_ids_names_the_token_of_every_row(case: Case) -> None:
    """place_ids gives the oracle's token for every row and the pad elsewhere."""
    layout, lengths = case
    ids = [torch.arange(length) + 100 * number for number, length in enumerate(lengths)]
    expected = [-7 if w is PAD else 100 * w[0] + w[1] for w in oracle(layout, lengths)]
    assert layout.place_ids(ids, pad=-7).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_the_ranks_together_hold_every_token_once(case: Case) -> None:
    """Over all ranks no token is lost and none is there twice."""
    layout, lengths = case
    ids = list(torch.arange(sum(lengths)).split_with_sizes(lengths))
    tp_ranks = range(layout.tp_size) if layout.sequence_parallel else [0]
    parts = [
        dataclasses.replace(layout, cp_rank=c, tp_rank=t).place_ids(ids)
        for c in range(layout.cp_size)
        for t in tp_ranks
    ]
    assert len({len(part) for part in parts}) == 1
    everything = torch.cat(parts)
    assert sorted(everything[everything >= 0].tolist()) == list(range(sum(lengths)))


def test_context_parallel_alignment_applies_only_with_context_parallelism() -> None:
    """One context-parallel rank has no zigzag, so an odd sample gets no padding."""
    assert Layout().place([sample(0, 5)]).num_tokens == 5
    assert Layout(cp_size=2).place([sample(0, 5)]).num_tokens == 4


def test_a_padded_batch_is_sequence_major() -> None:
    """With two samples per microbatch their tokens alternate, as Megatron's flatten has them."""
    layout = Layout(packed=False, seq_length=3)
    ids = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
    assert layout.place_ids(ids).tolist() == [1, 4, 2, 5, 3, -1]


def test_equal_samples_padded_are_the_unflattened_pack() -> None:
    """Megatron 0.19.2 turns a pack of equal samples into [S, mbs]: the padded order."""
    ids = [torch.arange(6) + 10 * number for number in range(3)]
    pack = Layout().place_ids(ids)
    unflattened = pack.view(3, 6).transpose(0, 1).reshape(-1)
    assert torch.equal(Layout(packed=False, seq_length=6).place_ids(ids), unflattened)


def test_zigzag_by_hand() -> None:
    """Rank r of 2 has chunks r and 3 - r of each sample, and half of the tail."""
    ids = [torch.arange(8), torch.arange(3) + 20]
    first, second = (
        Layout(cp_size=2, cp_rank=r, pad_to_multiple=16).place_ids(ids).tolist() for r in (0, 1)
    )
    assert first == [0, 1, 6, 7, 20, -1, -1, -1]
    assert second == [2, 3, 4, 5, 21, 22, -1, -1]


def test_contiguous_cuts_the_whole_microbatch_after_its_tail() -> None:
    """With contiguous context parallelism only the last ranks see the tail."""
    ids = [torch.arange(3), torch.arange(2) + 20]
    parts = [
        Layout(cp_size=2, cp_rank=r, cp_order="contiguous", pad_to_multiple=8).place_ids(ids)
        for r in (0, 1)
    ]
    assert [part.tolist() for part in parts] == [[0, 1, 2, 20], [21, -1, -1, -1]]


def test_a_placed_part_holds_its_own_memory() -> None:
    """Pickling a part sends that part only, not the sample that it was cut from."""
    placed = Layout(cp_size=2, cp_order="contiguous").place([sample(0, 20)])
    assert placed.experts.untyped_storage().nbytes() == placed.experts.nbytes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tp_rank": 1}, "tp_rank=1 does not exist with tp_size=1"),
        ({"cp_size": 2, "cp_rank": 2}, "cp_rank=2 does not exist with cp_size=2"),
        ({"cp_size": 0}, "cp_size=0"),
        ({"cp_order": "ring"}, "cp_order is 'ring'"),
        ({"align": 0}, "align=0"),
        ({"seq_length": 8}, "belong to padded batches"),
        ({"padding_side": "left"}, "belong to padded batches"),
        ({"packed": False}, "seq_length is None"),
        ({"packed": False, "seq_length": 8, "align": 2}, "belong to packed batches"),
        ({"packed": False, "seq_length": 6, "cp_size": 2}, "cannot be cut into 4 chunks"),
        (
            {"packed": False, "seq_length": 4, "cp_size": 2, "tp_size": 4}
            | {"sequence_parallel": True},
            "each rank's part into 4 for sequence parallelism",
        ),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    """A layout that no batch can have does not get built."""
    with pytest.raises(RoutesError, match=message):
        Layout(**fields)


def test_tokens_that_cannot_be_cut_are_refused() -> None:
    """An uneven cut names the number of tokens and the field to set."""
    uneven = Layout(tp_size=2, sequence_parallel=True)
    with pytest.raises(RoutesError, match=r"5 tokens cannot be cut over tp_size=2.*pad_to_mult"):
        uneven.place([sample(0, 5)])
    uneven = Layout(cp_size=2, cp_order="contiguous")
    with pytest.raises(RoutesError, match=r"5 tokens cannot be cut over cp_size=2.*pad_to_mult"):
        uneven.place([sample(0, 5)])


def test_a_sample_longer_than_the_row_is_refused() -> None:
    """Truncation is the user's decision: place does not drop tokens."""
    with pytest.raises(RoutesError, match="sample 1 has 9 tokens, more than seq_length=8"):
        Layout(packed=False, seq_length=8).place([sample(0, 3), sample(1, 9)])


def test_unlike_samples_are_refused() -> None:
    """Samples with other layers cannot share a microbatch."""
    with pytest.raises(RoutesError, match=r"the samples differ in .*Routes.select"):
        Layout().place([sample(0, 3), sample(1, 3).select((5,))])
    with pytest.raises(RoutesError, match="got none"):
        Layout().place([])
    with pytest.raises(RoutesError, match="1-dimensional"):
        Layout().place_ids([torch.zeros(1, 3)])


class Config:
    tensor_model_parallel_size = 4
    context_parallel_size = 2
    sequence_parallel = True


def test_from_megatron_takes_sizes_from_the_config_and_given_ranks() -> None:
    """On a controller the ranks are given, and nothing of Megatron is needed."""
    layout = Layout.from_megatron(Config, tp_rank=3, cp_rank=1, align=8)
    assert layout == Layout(
        tp_size=4, tp_rank=3, cp_size=2, cp_rank=1, sequence_parallel=True, align=8
    )


def test_from_megatron_takes_the_ranks_of_an_initialised_parallel_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inside a training process the ranks come from Megatron."""
    state = types.SimpleNamespace(
        model_parallel_is_initialized=lambda: True,
        get_tensor_model_parallel_rank=lambda: 2,
        get_context_parallel_rank=lambda: 1,
    )
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)
    layout = Layout.from_megatron(Config)
    assert (layout.tp_rank, layout.cp_rank) == (2, 1)


def test_from_megatron_asks_for_a_rank_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 is never assumed where there are several."""
    monkeypatch.delitem(sys.modules, "megatron.core.parallel_state", raising=False)
    with pytest.raises(RoutesError, match="not initialised: give cp_rank"):
        Layout.from_megatron(Config, tp_rank=0)
