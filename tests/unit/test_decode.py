"""decode: every wire format, whole or from some token on."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from engines import FORMATS, Encoder, Sample, b64, envelope, make, samples
from hypothesis import given, settings
from hypothesis import strategies as st

from r3patch import Routes, RoutesError, decode


@pytest.mark.parametrize("encode", FORMATS.values(), ids=FORMATS.keys())
def test_every_format_decodes_to_the_same_routes(
    encode: Encoder, recwarn: pytest.WarningsRecorder
) -> None:
    """Encoded by the format's rule, decoded: equal, for any sizes, and without a torch warning."""

    @settings(max_examples=40, deadline=None)
    @given(samples())
    def check(sample: Sample) -> None:
        assert decode(encode(sample), **sample.sizes) == sample.routes

    check()
    assert not [w for w in recwarn.list if "writable" in str(w.message)]


def test_sizes_that_are_given_count_more_than_those_of_the_config() -> None:
    """A rollout of another depth, or of a pruned model, under the config of the whole one."""
    sample = make()
    whole = {"num_hidden_layers": 99, "num_experts": 999, "num_experts_per_tok": 9}
    decoded = decode(FORMATS["sglang"](sample), config=whole, **sample.sizes)
    assert decoded == sample.routes


@pytest.mark.parametrize("encode", [FORMATS["sglang"], FORMATS["vllm narrow npy"]])
def test_the_standard_library_decodes_too(encode: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """pybase64 is a matter of speed."""
    monkeypatch.setitem(sys.modules, "pybase64", None)
    sample = make()
    assert decode(encode(sample), **sample.sizes) == sample.routes
    with pytest.raises(RoutesError, match="is not base64"):
        decode("$$$$", **sample.sizes)


def test_flat_payloads_need_no_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's format is read by torch alone; a .npy names the extra."""
    sample = make()
    flat, file = FORMATS["sglang"](sample), FORMATS["vllm narrow npy"](sample)
    routes = sample.routes
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert decode(flat, **sample.sizes) == routes
    with pytest.raises(
        RoutesError, match=r"needs numpy: pip install '\.\[rollout\]' in a checkout"
    ):
        decode(file, **sample.sizes)


@pytest.mark.parametrize("num_experts", [255, 256, 257])
def test_the_greatest_ids_around_one_byte_survive(num_experts: int) -> None:
    """256 experts use every value of a byte, 257 need two."""
    sample = make(num_tokens=3, topk=2, num_experts=num_experts)
    sample.rows[:] = [num_experts - 1, num_experts - 2]
    for name in ("sglang", "vllm array", "vllm narrow npy", "tensorrt-llm"):
        routes = decode(FORMATS[name](sample), **sample.sizes)
        assert routes == sample.routes
        assert routes.experts.element_size() == (1 if num_experts <= 256 else 2)


def test_all_layers_are_moe_layers_unless_said() -> None:
    """moe_layers=None takes every column."""
    sample = make(moe_layers=(1, 2, 3, 4))
    routes = decode(FORMATS["sglang"](sample), **(sample.sizes | {"moe_layers": None}))
    assert routes == sample.routes


def test_hash_routed_layers_are_left_out() -> None:
    """Layers missing from moe_layers may hold zeros: they are not looked at."""
    sample = make(moe_layers=(3, 4))
    assert decode(FORMATS["sglang"](sample), **sample.sizes).layers == (3, 4)


# Row counts and start


@settings(max_examples=150, deadline=None)
@given(samples(), st.data())
def test_start_is_honoured_ignored_or_stated(sample: Sample, data: st.DataObject) -> None:
    """Rows from start on, all rows from an old server, and a start in the payload."""
    start = data.draw(st.integers(0, max(0, sample.num_tokens - 1)))
    full = sample.all_layers().astype("<i4")
    sent = b64(full[start:].tobytes())
    assert decode(sent, **sample.sizes, start=start) == sample.from_token(start)
    assert decode(b64(full.tobytes()), **sample.sizes, start=start) == sample.routes
    stated = envelope(full[start:], full[start:].tobytes(), start=start)
    assert decode(stated, **sample.sizes) == sample.from_token(start)
    echoed = {"routed_experts": sent, "routed_experts_start_len": start}
    assert decode(echoed, **sample.sizes) == sample.from_token(start)
    assert decode({"routed_experts": stated}, **sample.sizes) == sample.from_token(start)


def test_a_stated_start_is_not_second_guessed() -> None:
    """Where the payload says its start, only that number of rows fits."""
    sample = make(num_tokens=5)
    full = sample.all_layers().astype("<i4")
    with pytest.raises(RoutesError, match=r"has 4 rows, expected 2: 5 tokens.*less start=2"):
        decode(envelope(full, full.tobytes(), start=2), **sample.sizes)


def test_a_surplus_row_goes_with_no_start() -> None:
    """As many rows as tokens from token 2 on are other tokens' rows."""
    sample, longer = make(num_tokens=5, num_layers=5), make(num_tokens=6, num_layers=5)
    with pytest.raises(RoutesError, match=r"has 5 rows, expected 2: 5 tokens.*less start=2"):
        decode(FORMATS["sglang"](longer), **sample.sizes, start=2)


def test_an_empty_string_is_zero_rows() -> None:
    """SGLang answers "" when start is at the last token; None is another thing."""
    sample = make(num_tokens=5)
    assert decode("", **sample.sizes, start=4).invalid_rows == 10
    with pytest.raises(RoutesError, match="has 0 rows, expected 4"):
        decode("", **sample.sizes)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_samples_without_rows_decode(num_tokens: int) -> None:
    """No token was fed, so there is nothing to know."""
    sample = make(num_tokens=num_tokens)
    for encode in FORMATS.values():
        assert decode(encode(sample), **sample.sizes) == sample.routes


def test_one_surplus_row_is_dropped() -> None:
    """vLLM 0.21 sends a row for the last token now and then; it never generated anything."""
    sample = make(num_tokens=5, num_layers=5)
    longer = make(num_tokens=6, num_layers=5)
    longer.rows[:4] = sample.rows
    for name in ("sglang", "vllm array", "vllm 0.21", "nemo"):
        assert decode(FORMATS[name](longer), **sample.sizes) == sample.routes


def test_a_surplus_row_that_could_be_wider_rows_is_refused() -> None:
    """5 flat rows of 12 ids are 4 rows of 15 too: num_layers=5 given as 4, not a surplus row."""
    sample = make(num_tokens=5, num_layers=5, moe_layers=(1, 2, 3, 4, 5))
    with pytest.raises(RoutesError, match="has 5 rows, expected 4"):
        decode(FORMATS["sglang"](sample), num_tokens=5, num_layers=4, topk=3, num_experts=20)


@pytest.mark.parametrize("rows", [0, 1, 3, 6, 7])
def test_any_other_number_of_rows_is_refused(rows: int) -> None:
    """A wrong count means other tokens than the engine's: nothing is padded or cut."""
    sample = make(num_tokens=5)
    other = make(num_tokens=rows + 1)
    for name in ("sglang", "vllm narrow npy", "vllm array", "nemo"):
        with pytest.raises(RoutesError, match=rf"^s7: the payload has {rows} rows, expected 4: 5"):
            decode(FORMATS[name](other), **sample.sizes, name="s7")


@pytest.mark.parametrize("start", [-1, 5, 9, "2"])
def test_a_start_outside_the_sample_is_refused(start: Any) -> None:
    """start counts tokens of this sample."""
    with pytest.raises(RoutesError, match=rf"start is {start!r} with 5 tokens, expected 0 to 4"):
        decode("", **make(num_tokens=5).sizes, start=start)


@pytest.mark.parametrize("delta", [True, False])
def test_turns_join_to_one_sample(delta: bool) -> None:
    """A second turn from the last row of the first on, or in full: the same routes."""
    whole = make(num_tokens=12)
    sent = whole.all_layers().astype("<i4")
    sizes = whole.sizes | {"num_tokens": 7}
    first = decode(b64(sent[:6].tobytes()), **sizes)
    start = 6 if delta else 0
    second = decode(b64(sent[start:].tobytes()), **whole.sizes, start=start)
    assert Routes.join([first, second]) == whole.routes
