"""Tokens travel with rows: through every method, file and layout."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import FORMATS, make, routes
from hypothesis import given, settings
from hypothesis import strategies as st
from microbatches import Case, layouts

from r3patch import Layout, Routes, RoutesError, decode


def tagged(tokens: list[int], seed: int = 0) -> Routes:
    """Rows that depend on the token and all before it, as a causal model's do; the last unknown."""
    rows = []
    for end in range(1, len(tokens) + 1):
        generator = torch.Generator().manual_seed(hash((seed, *tokens[:end])) % 2**31)
        rows.append(torch.rand(2, 8, generator=generator).topk(2).indices)
    experts = torch.stack(rows) if rows else torch.zeros(0, 2, 2, dtype=torch.int64)
    valid = torch.arange(len(tokens)) < len(tokens) - 1
    return Routes(experts, (2, 5), valid, num_experts=8, tokens=tokens)


@pytest.mark.parametrize(
    "given_as",
    [
        [5, 0, 131_071],
        (5, 0, 131_071),
        torch.tensor([5, 0, 131_071]),
        torch.tensor([5, 0, 131_071], dtype=torch.int32),
        np.array([5, 0, 131_071], np.uint32),
        np.array([5, 0, 131_071], np.int64),
    ],
)
def test_tokens_are_kept_as_int32(given_as: Any) -> None:
    """Whatever they come as; the caller's own array is copied."""
    part = Routes(routes(3).experts, (2, 3, 5), num_experts=8, tokens=given_as)
    assert part.tokens is not None
    assert (part.tokens.dtype, part.tokens.tolist()) == (torch.int32, [5, 0, 131_071])
    if isinstance(given_as, torch.Tensor):
        given_as.fill_(1)
        assert part.tokens.tolist() == [5, 0, 131_071]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2], r"tokens has shape \(2,\), expected \[3\]"),
        ([[1, 2, 3]], r"tokens has shape \(1, 3\), expected \[3\]"),
        ([1, 2, -2], "tokens holds -2 to 2, expected token ids, or -1 for none"),
        ([1, 2, 2**31], "tokens holds 1 to 2147483648"),
        ([1, 2, 2**70], "tokens cannot be made a tensor"),
        ([1.0, 2.0, 3.0], r"tokens has dtype torch.float32, expected integers"),
        ([True, False, True], r"tokens has dtype torch.bool"),
        ("abc", "tokens cannot be made a tensor"),
        (torch.zeros(3, dtype=torch.int32, device="meta"), "pass an ordinary dense tensor"),
    ],
)
def test_what_are_no_tokens_is_refused(tokens: Any, message: str) -> None:
    """Each refusal names the argument, wherever tokens are given."""
    with pytest.raises(RoutesError, match=message):
        Routes(routes(3).experts, (2, 3, 5), num_experts=8, tokens=tokens)
    with pytest.raises(RoutesError, match=message):
        Routes.missing(3, (2, 3), 2, 8, tokens=tokens)


def test_every_method_keeps_tokens(tmp_path: Path) -> None:
    """select, slices, masks, positions, pickle, torch.save, files."""
    whole = tagged([7, 8, 9, 8])
    assert whole.select((5,)).tokens is whole.tokens
    mask = torch.tensor([True, False, True, True])
    for part, expected in [
        (whole[1:3], [8, 9]),
        (whole[mask], [7, 9, 8]),
        (whole[torch.tensor([3, 0])], [8, 7]),
        (whole[:0], []),
    ]:
        assert part.tokens is not None
        assert part.tokens.tolist() == expected
    assert pickle.loads(pickle.dumps(whole)) == whole
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False) == whole
    whole.save(tmp_path / "routes")
    assert Routes.load(tmp_path / "routes") == whole


def test_tokens_are_part_of_equality_and_of_the_repr() -> None:
    """Rows of other tokens are other routes, and rows of no known token as well."""
    whole = tagged([7, 8, 9])
    other = Routes(whole.experts, whole.layers, whole.valid, num_experts=8, tokens=[7, 8, 8])
    none = Routes(whole.experts, whole.layers, whole.valid, num_experts=8)
    assert whole != other
    assert whole != none
    assert none != whole
    assert repr(whole).endswith("invalid_rows=2, with tokens)")


def test_a_changed_token_in_a_file_is_refused(tmp_path: Path) -> None:
    """The checksum covers tokens."""
    path = tmp_path / "routes"
    tagged([7, 8, 9]).save(path)
    raw = path.read_bytes()
    at = raw.rindex(np.array([7, 8, 9], np.int32).tobytes())
    path.write_bytes(raw[:at] + b"\x06" + raw[at + 1 :])
    with pytest.raises(RoutesError, match="checksum"):
        Routes.load(path)


# decode


@pytest.mark.parametrize("encode", FORMATS.values(), ids=FORMATS.keys())
def test_decode_counts_and_keeps_the_tokens(encode: Any) -> None:
    """tokens= says how many rows there are, and stays with them."""
    sample = make()
    sizes = {name: size for name, size in sample.sizes.items() if name != "num_tokens"}
    routes = decode(encode(sample), tokens=[11, 12, 13, 14, 15], **sizes)
    assert routes.tokens is not None
    assert routes.tokens.tolist() == [11, 12, 13, 14, 15]
    assert routes != sample.routes
    routes.tokens = None
    assert routes == sample.routes


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({}, "tokens=, or else num_tokens=: one of both"),
        ({"tokens": [1] * 5, "num_tokens": 5}, "tokens=, or else num_tokens=: one of both"),
        ({"tokens": [1] * 4}, "has 4 rows, expected 3: 4 tokens"),
        ({"tokens": [[1] * 5]}, r"s7: tokens has shape \(1, 5\), expected \[num_tokens\]"),
        ({"tokens": "12345"}, "s7: tokens cannot be made a tensor"),
        ({"tokens": [1, 2, 3, 4, -5]}, "s7: tokens holds -5 to 4"),
    ],
)
def test_decode_takes_tokens_or_their_number(tokens: dict[str, Any], message: str) -> None:
    """Exactly one of both; tokens of another number than the rows are refused."""
    sample = make(num_layers=5)
    sizes = {name: size for name, size in sample.sizes.items() if name != "num_tokens"}
    with pytest.raises(RoutesError, match=message):
        decode(FORMATS["sglang"](sample), **tokens, **sizes, name="s7")


# join


def expected_join(parts: list[list[int]], keep: str) -> list[Any]:
    """Row by row: the first or the latest part whose tokens up to this one are the last part's."""
    truth, order = parts[-1], parts if keep == "first" else parts[::-1]
    rows: list[Any] = []
    for end in range(1, len(truth) + 1):
        fits = [p for p in order if p[:end] == truth[:end] and len(p) > end]
        rows.append(tagged(fits[0]).experts[end - 1].tolist() if fits else None)
    return rows


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=4),
    st.sampled_from(["first", "latest"]),
)
def test_join_takes_rows_of_the_last_parts_tokens_only(tails: list[list[int]], keep: Any) -> None:
    """Over all ways in which turns can agree, be rendered anew, grow and shrink."""
    parts = [[9, *tail] for tail in tails]
    joined = Routes.join([tagged(part) for part in parts], keep=keep)
    assert joined.tokens is not None
    assert joined.tokens.tolist() == parts[-1]
    rows = [
        row if known else None
        for row, known in zip(joined.experts.tolist(), joined.mask.all(1).tolist(), strict=True)
    ]
    # The longest common prefix of a causal model's tokens has the same rows: no policy needed.
    assert Routes.join([tagged(part) for part in parts]) == joined
    assert rows == expected_join(parts, keep)


def test_join_keeps_the_rows_of_the_turn_that_generated_the_tokens() -> None:
    """keep="first" under a history that was rendered anew: old rows up to there, then new ones."""
    old, new = tagged([1, 2, 3, 4, 5], seed=1), tagged([1, 2, 3, 7, 8, 9], seed=2)
    joined = Routes.join([old, new], keep="first")
    assert joined.experts[:3].tolist() == old.experts[:3].tolist()
    assert joined.experts[3:].tolist() == new.experts[3:].tolist()


def test_join_refuses_a_part_of_another_sequence() -> None:
    """A part that shares no token with the last is of another sample."""
    with pytest.raises(RoutesError, match=r"part 1 shares no token with the last part: it begins"):
        Routes.join([tagged([1, 2]), tagged([3, 4]), tagged([1, 2, 3])])


def test_join_logs_what_it_drops(caplog: pytest.LogCaptureFixture) -> None:
    """Rows of tokens that a turn has dropped go, and the log says how many."""
    caplog.set_level("INFO", logger="r3patch")
    Routes.join([tagged([1, 2, 3, 4]), tagged([1, 2, 9])])
    [record] = caplog.records
    assert "part 0 leaves the last part's tokens at token 2; its 2 rows" in record.getMessage()


def test_join_merges_the_layers_of_parts_with_tokens() -> None:
    """Pipeline stages have the same tokens."""
    whole = tagged([1, 2, 3])
    assert Routes.join([whole.select((2,)), whole.select((5,))]) == whole


def test_tokens_in_some_parts_only_are_refused() -> None:
    """Half of a check would pass for a check: all have tokens or none has."""
    mixed = [tagged([1, 2]), Routes.missing(2, (2, 5), 2, 8)]
    with pytest.raises(RoutesError, match=r"part 1 has no tokens and others have"):
        Routes.join(mixed)
    with pytest.raises(RoutesError, match=r"sample 1 has no tokens .* Routes.missing too"):
        Layout().place(mixed)


# place


@settings(max_examples=300, deadline=None)
@given(layouts(), st.integers(0, 2**31))
def test_place_carries_tokens_as_place_ids_does(case: Case, seed: int) -> None:
    """Packed, padded, zigzag, contiguous, cut for sequence parallelism; padding has -1."""
    layout, lengths = case
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 99, (length,), generator=generator) for length in lengths]
    samples = [
        Routes.missing(len(i), (1,), 1, 4, tokens=i)
        if number % 2
        else Routes((i % 4)[:, None, None], (1,), num_experts=4, tokens=i)
        for number, i in enumerate(ids)
    ]
    placed = layout.place(samples)
    assert placed.tokens is not None
    assert torch.equal(placed.tokens, layout.place_ids(ids).to(torch.int32))
    known = placed.mask[:, 0]
    assert torch.equal(placed.experts[known, 0, 0], (placed.tokens[known] % 4).to(torch.uint8))


def test_samples_without_tokens_are_placed_without() -> None:
    """No tokens are made up."""
    assert Layout().place([routes(3), routes(2)]).tokens is None
