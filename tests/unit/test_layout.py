"""Layout against a token-by-token oracle, written from the definition of each kind of batch."""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from microbatches import Case, layouts

from r3patch import Layout, Routes

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


def pack(
    layout: Layout, lengths: list[int], unit: int
) -> tuple[list[list[tuple[int, int] | None]], int]:
    """The samples padded to whole units, and the padding after them all."""
    wholes: list[list[tuple[int, int] | None]] = []
    for number, length in enumerate(lengths):
        whole: list[tuple[int, int] | None] = [(number, t) for t in range(length)]
        while len(whole) % unit:
            whole.append(PAD)
        wholes.append(whole)
    tail, total = 0, sum(map(len, wholes))
    while (
        (total + tail) % layout.pad_to_multiple
        if layout.pack_length is None
        else total + tail < layout.pack_length
    ):
        tail += 1
    return wholes, tail


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
        wholes, tail = pack(layout, lengths, math.lcm(layout.align, 2 * cp if zigzag else 1))
        if zigzag and layout.tail_in_last_sample:
            wholes[-1] += [PAD] * tail
            tail = 0
        if zigzag:
            for whole in wholes:
                mine += [x for i, x in enumerate(whole) if rank_of(i, len(whole)) == layout.cp_rank]
            mine += [PAD] * (tail // cp)
        else:
            row = [*itertools.chain(*wholes), *[PAD] * tail]
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


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_place_values_is_the_same_arithmetic(case: Case) -> None:
    """Log-probs, masks, vectors: any dtype and trailing shape, padding where place has it."""
    layout, lengths = case
    values = [torch.arange(length) + 100.5 * number for number, length in enumerate(lengths)]
    expected = [-1.0 if w is PAD else 100.5 * w[0] + w[1] for w in oracle(layout, lengths)]
    assert layout.place_values(values, pad=-1).tolist() == expected
    vectors = [torch.stack([v, v + 0.25], 1).to(torch.float64) for v in values]
    placed = layout.place_values(vectors, pad=float("nan"))
    assert placed.dtype == torch.float64
    assert placed.isnan().all(1).tolist() == [x == -1 for x in expected]
    assert placed[:, 1].nan_to_num(-1).tolist() == [x + 0.25 if x != -1 else -1 for x in expected]
    masks = [torch.ones(length, dtype=torch.bool) for length in lengths]
    assert layout.place_values(masks, pad=False).tolist() == [x != -1 for x in expected]


@settings(max_examples=200, deadline=None)
@given(layouts(), st.booleans(), st.booleans())
def test_unplace_is_the_inverse_of_place(case: Case, known: bool, tokens: bool) -> None:
    """The parts of all ranks give the samples again; what was recorded for padding is dropped."""
    layout, lengths = case
    samples = [sample(number, length) for number, length in enumerate(lengths)]
    if tokens:
        samples = [
            Routes(
                s.experts, LAYERS, s.valid, num_experts=EXPERTS, tokens=torch.arange(s.num_tokens)
            )
            for s in samples
        ]
    ranks = [
        dataclasses.replace(layout, cp_rank=c, tp_rank=t)
        for c in range(layout.cp_size)
        for t in (range(layout.tp_size) if layout.sequence_parallel else [layout.tp_rank])
    ]
    parts = [rank.place(samples) for rank in ranks]
    if known:  # as a recording has them: experts for padding and last tokens as well
        filler = torch.tensor([7, 8]).expand(parts[0].num_tokens, len(LAYERS), TOPK)
        parts = [
            Routes(
                torch.where(p.mask.unsqueeze(-1), p.experts, filler),
                LAYERS, num_experts=EXPERTS, tokens=p.tokens,
            )
            for p in parts
        ]  # fmt: skip
        samples = [
            Routes(
                torch.where(s.mask.unsqueeze(-1), s.experts, torch.tensor([7, 8])),
                LAYERS, num_experts=EXPERTS, tokens=s.tokens,
            )
            for s in samples
        ]  # fmt: skip
    assert layout.unplace(parts, lengths) == samples
    mine = layout.unplace(layout.place(samples), lengths)
    here = [{w[1] for w in oracle(layout, lengths) if w and w[0] == n} for n in range(len(lengths))]
    for part, whole, tokens_here in zip(mine, samples, here, strict=True):
        mask = torch.tensor([t in tokens_here for t in range(whole.num_tokens)], dtype=torch.bool)
        assert part.mask.tolist() == (whole.mask & mask.unsqueeze(1)).tolist()
        assert part.experts[part.mask].tolist() == whole.experts[part.mask].tolist()
        if whole.tokens is not None and part.tokens is not None:
            assert part.tokens.tolist() == torch.where(mask, whole.tokens, -1).tolist()


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


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_prompts_on_the_left_and_responses_on_the_right(data: st.DataObject) -> None:
    """verl and tunix: every prompt ends at the width, every response begins there."""
    cp, tp = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, 2]))
    prompts = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    responses = [data.draw(st.integers(0, 7)) for _ in prompts]
    width = data.draw(st.integers(5, 9))
    size = 4 * math.ceil((width + 7) / 4)
    layout = Layout(
        packed=False, seq_length=size, prompt_width=width, cp_size=cp, tp_size=tp,
        sequence_parallel=True, cp_rank=data.draw(st.integers(0, cp - 1)),
        tp_rank=data.draw(st.integers(0, tp - 1)), cp_order="contiguous",
    )  # fmt: skip
    batch = torch.full((len(prompts), size), -1)
    ids, samples = [], []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids.append(torch.arange(prompt + response) + 100 * row)
        batch[row, width - prompt : width] = ids[-1][:prompt]
        batch[row, width : width + response] = ids[-1][prompt:]
        samples.append(Routes.missing(prompt + response, (1,), 1, 4, tokens=ids[-1]))
    expected = batch.t().chunk(cp)[layout.cp_rank].reshape(-1).chunk(tp)[layout.tp_rank]
    placed = layout.place(samples, prompts)
    assert placed.tokens is not None
    assert placed.tokens.tolist() == expected.tolist()
    assert layout.place_ids(ids, prompts=prompts).tolist() == expected.tolist()
    parts = [
        dataclasses.replace(layout, cp_rank=c, tp_rank=t).place(samples, prompts)
        for c in range(cp)
        for t in range(tp)
    ]
    assert layout.unplace(parts, [len(i) for i in ids], prompts) == samples


def test_the_tail_in_the_last_sample_by_hand() -> None:
    """NeMo-RL with pipeline and context parallelism: the tail is cut with the last sample."""
    ids = [torch.tensor([1, 2]), torch.arange(6, 12)]
    own = Layout(cp_size=2, pad_to_multiple=16).place_ids(ids, pad=0)
    last = Layout(cp_size=2, pad_to_multiple=16, tail_in_last_sample=True).place_ids(ids, pad=0)
    assert own.tolist() == [1, 0, 6, 7, 0, 0, 0, 0]
    assert last.tolist() == [1, 0, 6, 7, 8, 0, 0, 0]


def test_a_pack_of_one_length_by_hand() -> None:
    """Every microbatch has the same shape, whatever its samples."""
    ids = [torch.tensor([1, 2, 3])]
    assert Layout(pack_length=6).place_ids(ids).tolist() == [1, 2, 3, -1, -1, -1]
    half = Layout(pack_length=6, cp_size=2, cp_rank=1, cp_order="contiguous")
    assert half.place_ids(ids).tolist() == [-1, -1, -1]
