"""Layout by the recipes of docs/rollout.md against what each framework does to its tokens.

The rules are written down here as the frameworks have them, on lists of numbers and one rank at a
time; none of them uses Layout's arithmetic. A token is a number of its own, padding is PAD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch

from r3patch import Layout

PAD = -1
Tokens = list[int]

LENGTHS = [[5], [8, 3], [1, 16, 7], [9, 9, 2, 30]]


class Ranks(NamedTuple):
    """The parallel sizes and this rank's place."""

    tp: int
    tp_rank: int
    cp: int
    cp_rank: int


RANKS = [
    Ranks(tp, tp_rank, cp, cp_rank)
    for tp in (1, 2)
    for cp in (1, 2, 3)
    for tp_rank in range(tp)
    for cp_rank in range(cp)
]


def samples_of(lengths: Sequence[int]) -> list[Tokens]:
    """Every token another number."""
    return [[100 * (sample + 1) + token for token in range(n)] for sample, n in enumerate(lengths)]


def padded(tokens: Tokens, length: int) -> Tokens:
    return tokens + [PAD] * (length - len(tokens))


def up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def zigzag(tokens: Tokens, ranks: Ranks) -> Tokens:
    """Chunks r and 2 * cp - 1 - r of a sequence that divides."""
    if ranks.cp == 1:
        return tokens
    size, rest = divmod(len(tokens), 2 * ranks.cp)
    assert not rest
    last = 2 * ranks.cp - 1 - ranks.cp_rank
    head = tokens[ranks.cp_rank * size : (ranks.cp_rank + 1) * size]
    return head + tokens[last * size : (last + 1) * size]


def sequence_parallel(tokens: Tokens, ranks: Ranks) -> Tokens:
    size, rest = divmod(len(tokens), ranks.tp)
    assert not rest
    return tokens[ranks.tp_rank * size : (ranks.tp_rank + 1) * size]


def sequence_major(rows: list[Tokens]) -> Tokens:
    """``[s, b]`` flattened, as Megatron's router has it."""
    return [row[place] for place in range(len(rows[0])) for row in rows]


def layout(ranks: Ranks, **fields: Any) -> Layout:
    return Layout(
        tp_size=ranks.tp,
        tp_rank=ranks.tp_rank,
        cp_size=ranks.cp,
        cp_rank=ranks.cp_rank,
        sequence_parallel=ranks.tp > 1,
        **fields,
    )


# Packed: what the framework does, and the recipe.


def miles(samples: list[Tokens], ranks: Ranks) -> Tokens:
    """miles, slime: a sample to 2 * cp chunks of ceil; this rank's pack to tp * multiplier."""
    own = []
    for tokens in samples:
        chunk = math.ceil(len(tokens) / (2 * ranks.cp))
        own += zigzag(padded(tokens, 2 * ranks.cp * chunk if ranks.cp > 1 else len(tokens)), ranks)
    return sequence_parallel(padded(own, up(len(own), ranks.tp * 8)), ranks)


def miles_allgather(samples: list[Tokens], ranks: Ranks) -> Tokens:
    """miles, slime with allgather-CP: all samples, padded, in plain chunks."""
    pack = [token for tokens in samples for token in tokens]
    pack = padded(pack, up(len(pack), ranks.cp * ranks.tp * 8))
    size = len(pack) // ranks.cp
    return sequence_parallel(pack[ranks.cp_rank * size : (ranks.cp_rank + 1) * size], ranks)


def verl(samples: list[Tokens], ranks: Ranks) -> Tokens:
    """verl, packed: every sample to a multiple of tp * cp * 2, or of tp without CP."""
    align = ranks.tp * ranks.cp * 2 if ranks.cp > 1 else ranks.tp
    own = []
    for tokens in samples:
        own += zigzag(padded(tokens, up(len(tokens), align)), ranks)
    return sequence_parallel(own, ranks)


def verl_fp8(samples: list[Tokens], ranks: Ranks) -> Tokens:
    """verl with fp8: to the common multiple with 16, and the pack's tail in the last sample."""
    align = math.lcm(16, ranks.tp * ranks.cp * 2 if ranks.cp > 1 else ranks.tp)
    rows = [padded(tokens, up(len(tokens), align)) for tokens in samples]
    total = sum(map(len, rows))
    rows[-1] = padded(rows[-1], len(rows[-1]) + up(total, align * 4) - total)
    return sequence_parallel([token for row in rows for token in zigzag(row, ranks)], ranks)


def nemo(samples: list[Tokens], ranks: Ranks) -> Tokens:
    """NeMo-RL with pipeline and context parallelism: all packs of one length, by the last."""
    align = 2 * ranks.cp * ranks.tp
    rows = [padded(tokens, up(len(tokens), align)) for tokens in samples]
    rows[-1] = padded(rows[-1], len(rows[-1]) + NEMO_LENGTH - sum(map(len, rows)))
    return sequence_parallel([token for row in rows for token in zigzag(row, ranks)], ranks)


NEMO_LENGTH = 144  # of every pack, over all ranks


def ms_swift(samples: list[Tokens], ranks: Ranks) -> Tokens:
    """ms-swift without padding, and SkyRL: padded samples, each cut, one after the other."""
    rows = [padded(tokens, up(len(tokens), 2 * ranks.cp * ranks.tp)) for tokens in samples]
    own: Tokens = []
    for row in rows:
        own += zigzag(row, ranks)
    return sequence_parallel(own, ranks)


PACKED: dict[str, tuple[Callable[[list[Tokens], Ranks], Tokens], Callable[[Ranks], Layout]]] = {
    "miles, slime": (miles, lambda r: layout(r, pad_to_multiple=r.cp * r.tp * 8)),
    "miles, slime allgather": (
        miles_allgather,
        lambda r: layout(r, pad_to_multiple=r.cp * r.tp * 8, cp_order="contiguous"),
    ),
    "verl": (verl, lambda r: layout(r, align=r.tp * r.cp * 2 if r.cp > 1 else r.tp)),
    "verl fp8": (
        verl_fp8,
        lambda r: layout(
            r,
            align=math.lcm(16, r.tp * r.cp * 2 if r.cp > 1 else r.tp),
            pad_to_multiple=4 * math.lcm(16, r.tp * r.cp * 2 if r.cp > 1 else r.tp),
            tail_in_last_sample=True,
        ),
    ),
    "NeMo-RL": (
        nemo,
        lambda r: layout(
            r, align=2 * r.cp * r.tp, pack_length=NEMO_LENGTH, tail_in_last_sample=True
        ),
    ),
    "ms-swift, SkyRL packed": (ms_swift, lambda r: layout(r, align=2 * r.cp * r.tp)),
}


@pytest.mark.parametrize("framework", PACKED)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_batches_are_the_frameworks(framework: str, lengths: list[int]) -> None:
    """On every rank of every size, token by token."""
    rule, recipe = PACKED[framework]
    samples = samples_of(lengths)
    for ranks in RANKS:
        ids = [torch.tensor(tokens) for tokens in samples]
        assert recipe(ranks).place_ids(ids, pad=PAD).tolist() == rule(samples, ranks), ranks


# Padded: one row per sample, `S` tokens long.

S, PROMPT = 36, 12


def prompts_of(samples: list[Tokens]) -> list[int]:
    return [(len(tokens) + 1) // 3 for tokens in samples]


def right(tokens: Tokens, prompt: int) -> Tokens:
    """ms-swift: right-padded rows."""
    return padded(tokens, S)


def left(tokens: Tokens, prompt: int) -> Tokens:
    """SkyRL, ROLL: left-padded rows, the response ends the row."""
    return [PAD] * (S - len(tokens)) + tokens


def both(tokens: Tokens, prompt: int) -> Tokens:
    """verl, tunix: the prompt ends at one width in every row, the response begins there."""
    row = [PAD] * S
    for place, token in enumerate(tokens):
        row[PROMPT - prompt + place] = token
    return row


PADDED: dict[str, tuple[Callable[[Tokens, int], Tokens], dict[str, Any]]] = {
    "ms-swift": (right, {}),
    "SkyRL, ROLL": (left, {"padding_side": "left"}),
    "verl, tunix": (both, {"prompt_width": PROMPT}),
}


@pytest.mark.parametrize("framework", PADDED)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_padded_batches_are_the_frameworks(framework: str, lengths: list[int]) -> None:
    """Cut along s by zigzag and sequence parallelism, then sequence-major, token by token."""
    rule, fields = PADDED[framework]
    samples = samples_of(lengths)
    prompts = prompts_of(samples)
    for ranks in RANKS:
        rows = [rule(tokens, prompt) for tokens, prompt in zip(samples, prompts, strict=True)]
        expected = sequence_major([sequence_parallel(zigzag(row, ranks), ranks) for row in rows])
        placed = layout(ranks, packed=False, seq_length=S, **fields).place_ids(
            [torch.tensor(tokens) for tokens in samples],
            pad=PAD,
            prompts=prompts if "prompt_width" in fields else None,
        )
        assert placed.tolist() == expected, ranks
