"""decode_batch: samples, aborted samples and turns in one call, against decode and join."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from engines import FORMATS, Sample, b64, make

from r3patch import Routes, RoutesError, decode
from r3patch.rows.batch import decode_batch

ENCODE = FORMATS["sglang"]


def model(sample: Sample) -> dict[str, Any]:
    return {name: size for name, size in sample.sizes.items() if name != "num_tokens"}


def turns_of(sample: Sample, cut: int) -> tuple[list[Any], list[Any]]:
    """Two answers: the first `cut` tokens, then everything from the last row on."""
    sent = sample.all_layers().astype("<i4")
    return [b64(sent[: cut - 1].tobytes()), b64(sent[cut - 1 :].tobytes())], [0, cut - 1]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_is_its_samples_one_by_one(threads: int) -> None:
    """Payloads of any kind, an aborted one and turns, in order, with or without threads."""
    whole = [make(num_tokens=4 + n, seed=n) for n in range(7)]
    ids = [list(range(n, n + sample.num_tokens)) for n, sample in enumerate(whole)]
    samples: list[Any] = [list(FORMATS.values())[n](sample) for n, sample in enumerate(whole)]
    tokens: list[Any] = list(ids)
    start: list[Any] = [0] * 7
    samples[2] = None
    samples[5], start[5] = turns_of(whole[5], 4)
    tokens[5] = [ids[5][:4], ids[5]]
    samples[6], tokens[6] = whole[6].all_layers().tolist(), ids[6]
    seen: list[tuple[int, int]] = []
    batch = decode_batch(
        samples, tokens=tokens, start=start, **model(whole[0]), threads=threads,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    for number, (routes, sample) in enumerate(zip(batch, whole, strict=True)):
        expected = decode(ENCODE(sample), tokens=ids[number], **model(sample))
        if number == 2:
            expected = Routes.missing(6, (2, 4), 3, 20, tokens=ids[2])
        assert routes == expected, number
    assert seen == [(done, 7) for done in range(1, 8)]


def test_an_aborted_turn_leaves_a_gap() -> None:
    """None among turns gives missing rows for its tokens; the next turn fills what it has."""
    sample = make(num_tokens=8)
    ids = list(range(8))
    payloads, start = turns_of(sample, 5)
    [routes] = decode_batch(
        [[payloads[0], None]], tokens=[[ids[:5], ids]], start=[start], **model(sample)
    )
    assert routes.tokens is not None
    assert routes.tokens.tolist() == ids
    assert routes.mask.all(1).tolist() == [True] * 4 + [False] * 4


def test_keep_says_which_turn_counts() -> None:
    """Turns that differ are refused by sample, or joined as Routes.join does."""
    old, new = make(num_tokens=5, seed=1), make(num_tokens=7, seed=2)
    samples = [ENCODE(old), [ENCODE(old), ENCODE(new)]]
    arguments: dict[str, Any] = {"num_tokens": [5, [5, 7]], **model(old)}
    with pytest.raises(RoutesError, match=r"^sample 1: part 1 disagrees"):
        decode_batch(samples, **arguments)
    batch = decode_batch(samples, **arguments, keep="first")
    assert batch[1] == Routes.join([old.routes, new.routes], keep="first")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_tokens": [5]},
            r"the batch has 2 samples, but num_tokens is no list of as many: it has 1",
        ),
        ({"num_tokens": 5}, r"the batch has 2 samples, but num_tokens is no list of as many: 5"),
        ({"start": [0]}, r"2 samples, but start is no list of as many"),
        ({"tokens": [[1] * 5] * 2}, r"^sample 0: give the sample's token ids"),
        ({"num_tokens": None}, r"^sample 0: give the sample's token ids"),
        ({"samples": [None, ""], "num_tokens": [True, 5]}, r"^sample 0: num_tokens is True"),
        ({"samples": ["", ["", ""]]}, r"^sample 0: the payload has 0 rows"),
        ({"num_tokens": [5, 4]}, r"^sample 1: the payload has 4 rows, expected 3"),
        ({"threads": 0}, r"threads is 0"),
        ({"num_experts": None}, r"^num_experts is not given"),
    ],
)
def test_what_is_wrong_is_named_by_sample(changes: dict[str, Any], message: str) -> None:
    """The number of the sample stands in front; lists have one entry for each."""
    sample = make(num_layers=5)
    arguments = {"samples": [ENCODE(sample)] * 2, "num_tokens": [5, 5], **model(sample)} | changes
    with pytest.raises(RoutesError, match=message):
        decode_batch(**arguments)


def test_a_wrong_turn_is_named() -> None:
    """Sample and turn, and a list of turns needs as many lists of tokens."""
    sample = make(num_tokens=5, num_layers=5)
    turns = [[ENCODE(sample), ENCODE(sample)]]
    with pytest.raises(RoutesError, match=r"^sample 0, turn 1: the payload has 4 rows"):
        decode_batch(turns, num_tokens=[[5, 3]], **model(sample))
    with pytest.raises(RoutesError, match=r"^sample 0 has 2 turns, but num_tokens is no list"):
        decode_batch(turns, num_tokens=[5], **model(sample))


def test_an_empty_batch_is_empty() -> None:
    """No samples, no routes, no warning."""
    assert decode_batch([], tokens=[], **model(make())) == []


def test_num_experts_of_another_model_warns(caplog: pytest.LogCaptureFixture) -> None:
    """No id of the whole batch in the upper half of num_experts."""
    samples = [make(num_tokens=40, num_experts=20, seed=seed) for seed in range(10)]
    caplog.set_level(logging.WARNING)
    arguments = model(samples[0]) | {"num_tokens": [40] * 10}
    decode_batch([ENCODE(s) for s in samples], **arguments)
    assert not caplog.records
    decode_batch([ENCODE(s) for s in samples], **(arguments | {"num_experts": 38}))
    assert not caplog.records
    decode_batch([ENCODE(s) for s in samples], **(arguments | {"num_experts": 64}))
    [record] = caplog.records
    assert "num_experts is 64, but the greatest id of 2340 picks is 19" in record.getMessage()


def test_a_dead_layer_of_short_samples_is_found_at_top_1(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One short sample proves nothing, many do; on_bad_rows decides as in decode."""
    samples = [make(num_tokens=9, topk=1, seed=seed) for seed in range(8)]
    for sample in samples:
        sample.rows[:, 1] = 0
    payloads = [ENCODE(sample) for sample in samples]
    arguments = model(samples[0])
    assert len(decode_batch(payloads[:7], num_tokens=[9] * 7, **arguments)) == 7
    with pytest.raises(RoutesError, match=r"layers \[4\] have expert 0 in every row of all 8"):
        decode_batch(payloads, num_tokens=[9] * 8, **arguments)
    marked = decode_batch(payloads, num_tokens=[9] * 8, **arguments, on_bad_rows="invalid")
    assert [routes.mask.any(0).tolist() for routes in marked] == [[True, False]] * 8
    assert "layers [4] have expert 0" in caplog.text


def test_expert_0_may_stand_first_in_every_row() -> None:
    """Of several experts a row, zeros in one place are no layer that was never captured."""
    samples = [make(num_tokens=9, topk=2, seed=seed) for seed in range(8)]
    for sample in samples:
        sample.rows[:, 1] = [0, 1]
    payloads = [ENCODE(sample) for sample in samples]
    assert len(decode_batch(payloads, num_tokens=[9] * 8, **model(samples[0]))) == 8


def test_tokens_may_be_arrays() -> None:
    """A padded batch is cut to its samples by the caller; each may be an array or a tensor."""
    sample = make(num_tokens=5)
    batch = decode_batch(
        [ENCODE(sample)] * 2, tokens=[np.arange(5), torch.arange(5)], **model(sample)
    )
    assert batch[0] == batch[1]
    rows = decode_batch([ENCODE(sample)] * 2, tokens=np.ones((2, 5), np.int32), **model(sample))
    assert rows[0].tokens is not None
    assert rows[0].tokens.tolist() == [1] * 5
