"""decode: every wire format, and a clear no to what is none of them."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from r3patch import Routes, RoutesError, decode


@dataclass
class Sample:
    """What the engine knows: rows of the MoE layers, and the sizes."""

    rows: np.ndarray  # [num_tokens - 1, len(moe_layers), topk] int64
    num_tokens: int
    num_layers: int
    moe_layers: tuple[int, ...]
    topk: int
    num_experts: int

    @property
    def sizes(self) -> dict:
        names = ("num_tokens", "num_layers", "moe_layers", "topk", "num_experts")
        return {name: getattr(self, name) for name in names}

    @property
    def routes(self) -> Routes:
        return self.from_token(0)

    def from_token(self, start: int) -> Routes:
        experts = np.zeros((self.num_tokens, *self.rows.shape[1:]), np.int64)
        experts[: len(self.rows)] = self.rows
        token = torch.arange(self.num_tokens)
        valid = (token >= start) & (token < self.num_tokens - 1)
        return Routes(experts, self.moe_layers, valid, num_experts=self.num_experts)

    def all_layers(self, dense: int = 0) -> np.ndarray:
        full = np.full((len(self.rows), self.num_layers, self.topk), dense, np.int64)
        full[:, np.array(self.moe_layers) - 1] = self.rows
        return full


def make(num_tokens=5, num_layers=4, moe_layers=(2, 4), topk=3, num_experts=20, seed=0) -> Sample:
    random = np.random.default_rng(seed)
    shape = (max(0, num_tokens - 1), len(moe_layers), num_experts)
    rows = random.random(shape).argsort(-1)[..., :topk]
    return Sample(rows, num_tokens, num_layers, tuple(moe_layers), topk, num_experts)


@st.composite
def samples(draw: st.DrawFn, max_experts: int = 400, min_topk: int = 1) -> Sample:
    num_layers = draw(st.integers(1, 5))
    moe_layers = sorted(draw(st.sets(st.integers(1, num_layers), min_size=1)))
    topk = draw(st.integers(min_topk, 9))
    num_experts = draw(st.one_of(st.integers(topk, 20), st.sampled_from([128, 255, 256, 257, 384])))
    assume(num_experts <= max_experts and num_experts > 1)
    num_tokens = draw(st.integers(0, 12))
    return make(num_tokens, num_layers, moe_layers, topk, num_experts, draw(st.integers(0, 999)))


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def npy(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return b64(file.getvalue())


def narrowest(sample: Sample) -> type:
    return np.uint8 if sample.num_experts <= 256 else np.uint16


def nemo(array: np.ndarray) -> str:
    shape = "x".join(map(str, array.shape))
    return f"nrlre1:{array.dtype}:{shape}:{b64(array.tobytes())}"


def envelope(array: np.ndarray, data: object, **more: object) -> dict:
    return {"data": data, "shape": list(array.shape), "dtype": str(array.dtype), **more}


def read_only(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)


def prompt_and_generation(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    rows = sample.rows.astype(np.int16)
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


FORMATS = {
    "sglang": lambda s: b64(s.all_layers().astype("<i4").tobytes()),
    "sglang bytes": lambda s: b64(s.all_layers().astype("<i4").tobytes()).encode(),
    "sglang meta_info": lambda s: {
        "routed_experts": b64(s.all_layers().astype("<i4").tobytes()), "finish_reason": "stop"
    },
    "sglang with dtype": lambda s: {
        "routed_experts": b64(s.all_layers().astype("<u2").tobytes()),
        "routed_experts_dtype": "uint16",
    },
    "sglang tensor": lambda s: torch.from_numpy(s.all_layers().astype(np.int32)).flatten(),
    "vllm array": lambda s: s.all_layers().astype(narrowest(s)),
    "vllm read-only": lambda s: read_only(s.all_layers().astype(narrowest(s))),
    "vllm int32 npy": lambda s: npy(s.all_layers().astype(np.int32)),
    "vllm narrow npy": lambda s: npy(s.all_layers().astype(narrowest(s))),
    "vllm fortran npy": lambda s: npy(np.asfortranarray(s.all_layers().astype(np.uint16))),
    "vllm 0.21": prompt_and_generation,
    "vllm 0.21 lists": lambda s: tuple(part.tolist() for part in prompt_and_generation(s)),
    "vllm 0.21 response": lambda s: json.loads(
        json.dumps(
            {
                "prompt_routed_experts": prompt_and_generation(s)[0].tolist(),
                "routed_experts": prompt_and_generation(s)[1].tolist(),
            }
        )
    ),
    "tensorrt-llm": lambda s: torch.from_numpy(s.rows.astype(np.int16)),
    "lmdeploy": lambda s: s.all_layers(dense=54321).astype(np.uint16),
    "lmdeploy lists": lambda s: s.all_layers(dense=54321).tolist(),
    "envelope base64": lambda s: envelope(
        a := s.all_layers().astype(np.int16), b64(a.tobytes()), start=0
    ),
    "envelope bytes": lambda s: envelope(a := s.all_layers().astype(np.uint16), a.tobytes()),
    "nemo": lambda s: nemo(s.rows.astype(np.int16)),
    "nemo int32": lambda s: nemo(s.all_layers().astype(np.int32)),
    "big-endian array": lambda s: s.all_layers().astype(">i4"),
    "int64 tensor": lambda s: torch.from_numpy(s.all_layers()),
}  # fmt: skip


@pytest.mark.parametrize("encode", FORMATS.values(), ids=FORMATS.keys())
def test_every_format_decodes_to_the_same_routes(encode, recwarn):
    """Encoded by the format's rule, decoded: equal, for any sizes, and without a torch warning."""

    @settings(max_examples=40, deadline=None)
    @given(samples())
    def check(sample: Sample) -> None:
        assert decode(encode(sample), **sample.sizes) == sample.routes

    check()
    assert not [w for w in recwarn.list if "writable" in str(w.message)]


@pytest.mark.parametrize("encode", [FORMATS["sglang"], FORMATS["vllm narrow npy"]])
def test_the_standard_library_decodes_too(encode, monkeypatch):
    """pybase64 is a matter of speed."""
    monkeypatch.setitem(sys.modules, "pybase64", None)
    sample = make()
    assert decode(encode(sample), **sample.sizes) == sample.routes
    with pytest.raises(RoutesError, match="is not base64"):
        decode("$$$$", **sample.sizes)


def test_flat_payloads_need_no_numpy(monkeypatch):
    """SGLang's format is read by torch alone; a .npy names the extra."""
    sample = make()
    flat, file = FORMATS["sglang"](sample), FORMATS["vllm narrow npy"](sample)
    routes = sample.routes
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert decode(flat, **sample.sizes) == routes
    with pytest.raises(RoutesError, match=r"needs numpy: pip install \"r3patch\[rollout\]\""):
        decode(file, **sample.sizes)


@pytest.mark.parametrize("num_experts", [255, 256, 257])
def test_the_greatest_ids_around_one_byte_survive(num_experts):
    """256 experts use every value of a byte, 257 need two."""
    sample = make(num_tokens=3, topk=2, num_experts=num_experts)
    sample.rows[:] = [num_experts - 1, num_experts - 2]
    for name in ("sglang", "vllm array", "vllm narrow npy", "tensorrt-llm"):
        routes = decode(FORMATS[name](sample), **sample.sizes)
        assert routes == sample.routes
        assert routes.experts.element_size() == (1 if num_experts <= 256 else 2)


def test_all_layers_are_moe_layers_unless_said():
    """moe_layers=None takes every column."""
    sample = make(moe_layers=(1, 2, 3, 4))
    routes = decode(FORMATS["sglang"](sample), **(sample.sizes | {"moe_layers": None}))
    assert routes == sample.routes


def test_hash_routed_layers_are_left_out():
    """Layers missing from moe_layers may hold zeros: they are not looked at."""
    sample = make(moe_layers=(3, 4))
    assert decode(FORMATS["sglang"](sample), **sample.sizes).layers == (3, 4)


# Row counts and start


@settings(max_examples=150, deadline=None)
@given(samples(), st.data())
def test_start_is_honoured_ignored_or_stated(sample, data):
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


def test_a_stated_start_is_not_second_guessed():
    """Where the payload says its start, only that number of rows fits."""
    sample = make(num_tokens=5)
    full = sample.all_layers().astype("<i4")
    with pytest.raises(RoutesError, match=r"has 4 rows, expected 2: 5 tokens.*less start=2"):
        decode(envelope(full, full.tobytes(), start=2), **sample.sizes)


def test_an_empty_string_is_zero_rows():
    """SGLang answers "" when start is at the last token; None is another thing."""
    sample = make(num_tokens=5)
    assert decode("", **sample.sizes, start=4).invalid_rows == 10
    with pytest.raises(RoutesError, match="has 0 rows, expected 4"):
        decode("", **sample.sizes)


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_samples_without_rows_decode(num_tokens):
    """No token was fed, so there is nothing to know."""
    sample = make(num_tokens=num_tokens)
    for encode in FORMATS.values():
        assert decode(encode(sample), **sample.sizes) == sample.routes


def test_one_surplus_row_is_dropped():
    """vLLM 0.21 sends a row for the last token now and then; it never generated anything."""
    sample = make(num_tokens=5, num_layers=5)
    longer = make(num_tokens=6, num_layers=5)
    longer.rows[:4] = sample.rows
    for name in ("sglang", "vllm array", "vllm 0.21", "nemo"):
        assert decode(FORMATS[name](longer), **sample.sizes) == sample.routes


def test_a_surplus_row_that_could_be_wider_rows_is_refused():
    """5 flat rows of 12 ids are 4 rows of 15 too: num_layers=5 given as 4, not a surplus row."""
    sample = make(num_tokens=5, num_layers=5, moe_layers=(1, 2, 3, 4, 5))
    with pytest.raises(RoutesError, match="has 5 rows, expected 4"):
        decode(FORMATS["sglang"](sample), num_tokens=5, num_layers=4, topk=3, num_experts=20)


@pytest.mark.parametrize("rows", [0, 1, 3, 6, 7])
def test_any_other_number_of_rows_is_refused(rows):
    """A wrong count means other tokens than the engine's: nothing is padded or cut."""
    sample = make(num_tokens=5)
    other = make(num_tokens=rows + 1)
    for name in ("sglang", "vllm narrow npy", "vllm array", "nemo"):
        with pytest.raises(RoutesError, match=rf"^s7: the payload has {rows} rows, expected 4: 5"):
            decode(FORMATS[name](other), **sample.sizes, name="s7")


@pytest.mark.parametrize("start", [-1, 5, 9, "2"])
def test_a_start_outside_the_sample_is_refused(start):
    """start counts tokens of this sample."""
    with pytest.raises(RoutesError, match=rf"start is {start!r} with 5 tokens, expected 0 to 4"):
        decode("", **make(num_tokens=5).sizes, start=start)


@pytest.mark.parametrize("delta", [True, False])
def test_turns_join_to_one_sample(delta):
    """A second turn from the last row of the first on, or in full: the same routes."""
    whole = make(num_tokens=12)
    sent = whole.all_layers().astype("<i4")
    sizes = whole.sizes | {"num_tokens": 7}
    first = decode(b64(sent[:6].tobytes()), **sizes)
    start = 6 if delta else 0
    second = decode(b64(sent[start:].tobytes()), **whole.sizes, start=start)
    assert Routes.join([first, second]) == whole.routes


# Mutations: refused, or the same routes


def same_or_refused(payload: object, sample: Sample) -> None:
    with contextlib.suppress(RoutesError):
        assert decode(payload, **sample.sizes) == sample.routes


BYTES = ["sglang", "vllm int32 npy", "vllm narrow npy", "nemo", "sglang with dtype"]


@pytest.mark.parametrize("name", BYTES)
def test_truncated_and_extended_text_is_refused(name):
    """Text cut or lengthened anywhere never becomes other routes."""

    @settings(max_examples=60, deadline=None)
    @given(samples(), st.data())
    def check(sample: Sample, data: st.DataObject) -> None:
        sent = FORMATS[name](sample)
        text = sent["routed_experts"] if isinstance(sent, dict) else sent
        added = st.sampled_from(["A", "AAAA", "AAAAAAAA" * 3, "=", "\n", "AQAAAA=="])
        cut = st.integers(0, len(text)).map(lambda end: text[:end])
        changed = data.draw(st.one_of(cut, added.map(lambda more: text + more)))
        same_or_refused(
            sent | {"routed_experts": changed} if isinstance(sent, dict) else changed, sample
        )

    check()


@settings(max_examples=150, deadline=None)
@given(samples(), st.integers(-40, 40))
def test_bytes_lost_or_added_are_refused(sample, change):
    """The same on the bytes below the base64."""
    raw = sample.all_layers().astype("<i4").tobytes()
    same_or_refused(b64(raw[:change] if change < 0 else raw + b"\x01" * change), sample)


@settings(max_examples=150, deadline=None)
@given(samples(), st.sampled_from(["<i2", "<i8", "<u1", "<f4", ">i4"]))
def test_another_dtype_than_int32_is_refused(sample, dtype):
    """A flat payload is int32 unless it says otherwise."""
    assume(dtype != "<u1" or sample.num_experts <= 256)
    same_or_refused(b64(sample.all_layers().astype(dtype).tobytes()), sample)


@settings(max_examples=200, deadline=None)
@given(samples(), st.data())
def test_wrong_topk_or_num_layers_are_refused(sample, data):
    """No other sizes fit the same payload, flat or not."""
    assume(sample.num_tokens >= 2)
    sizes = {
        "topk": data.draw(st.integers(1, min(2 * sample.topk, sample.num_experts))),
        "num_layers": data.draw(st.integers(sample.num_layers, 2 * sample.num_layers)),
    }
    # Other sizes of the same product are the same bytes: nothing could tell them apart.
    assume(sizes["topk"] * sizes["num_layers"] != sample.topk * sample.num_layers)
    with pytest.raises(RoutesError):
        decode(FORMATS["sglang"](sample), **(sample.sizes | sizes))
    if len(sample.moe_layers) < sample.num_layers:  # else the axis counts the MoE layers
        with pytest.raises(RoutesError):
            decode(FORMATS["vllm narrow npy"](sample), **(sample.sizes | sizes))


@settings(max_examples=150, deadline=None)
@given(samples(min_topk=2), st.integers(1, 3))
def test_bytes_out_of_step_are_refused(sample, step):
    """Bytes shifted against the ids give ids of millions."""
    raw = sample.all_layers().astype("<i4").tobytes()
    same_or_refused(b64(raw[step:] + raw[:step]), sample)


@settings(max_examples=100, deadline=None)
@given(samples(), st.data())
def test_one_id_changed_is_refused_or_another_route(sample, data):
    """Of one changed id only a legal row may come, and then that very row."""
    assume(sample.rows.size)
    position = data.draw(st.integers(0, sample.rows.size - 1))
    value = data.draw(st.integers(-3, sample.num_experts + 3))
    sample.rows.reshape(-1)[position] = value
    row = sample.rows.reshape(-1, sample.topk)[position // sample.topk]
    legal = len(set(row)) == sample.topk and row.min() >= 0 and row.max() < sample.num_experts
    if legal or (row == -1).all():
        routes = decode(FORMATS["sglang"](sample), **sample.sizes)
        assert routes.invalid_rows == len(sample.moe_layers) + (not legal)
    else:
        with pytest.raises(RoutesError, match=r"1 of .* rows are bad"):
            decode(FORMATS["sglang"](sample), **sample.sizes)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=40), st.binary(max_size=40).map(b64), st.binary(max_size=40)))
def test_noise_is_refused(text):
    """Nothing but RoutesError comes out of noise."""
    sample = make()
    with pytest.raises(RoutesError):
        decode(text, **sample.sizes)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_changed_npy_byte_raises_nothing_but_routes_error(data):
    """A damaged header does not surface as numpy's error."""
    raw = bytearray(base64.b64decode(FORMATS["vllm narrow npy"](make())))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(RoutesError):
        decode(b64(bytes(raw)), **make().sizes)


def test_a_npy_of_python_objects_is_not_unpickled():
    """allow_pickle stays off."""
    with pytest.raises(RoutesError, match=r"\.npy payload is damaged: Object arrays"):
        decode(npy(np.array([[[object()]]])), **make().sizes)


# Malformed payloads


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (None, "returned no routes .None.*aborted.*Routes.missing"),
        (5, "type int is none of the formats"),
        ({"experts": []}, r"a mapping with keys \['experts'\] is no payload"),
        ({"routed_experts": None}, "returned no routes"),
        ("ray-store-key-1", "'ray-store-key-1'... is not base64.*LMDeploy.*fetch the array"),
        (b64(b"abc"), "3 bytes are not whole torch.int32 ids"),
        ("nrlre1:int16:4x2", "is not nrlre1:<dtype>"),
        ("nrlre1:int16:4x2x:AAAA", "is not nrlre1:<dtype>"),
        ("nrlre1:float:1x1x1:AAAA", "dtype is 'float', expected one of"),
        ("nrlre1:int16:4x2x3:AAAA", "has 0 ids|3 bytes are not whole"),
        ({"data": "AAAAAA==", "shape": [4, 2, 3], "dtype": "int16"}, r"2 ids, but states shape"),
        ({"data": "AAAAAA==", "shape": [-1, 2], "dtype": "int16"}, r"states shape \(-1, 2\)"),
        ({"data": 10, "shape": [1], "dtype": "int16"}, '"data" is int'),
        ({"routed_experts": "", "routed_experts_dtype": "float32"}, "dtype is 'float32'"),
        ([[1, 2], [3, 4]], r"shape \(2, 2\), expected flat ids or \[rows, layers, topk\]"),
        ([[[1], [2, 3]]], "no array of ids"),
        (np.zeros((4, 4, 3)), "dtype torch.float64, expected integer"),
        (np.zeros((4, 4, 3), bool), "dtype torch.bool"),
        (np.array([[["x"]]]), "no array of ids"),
        (torch.zeros(4, 4, 2, dtype=torch.int8), r"shape \(4, 4, 2\), expected topk=3"),
        (torch.zeros(4, 3, 3, dtype=torch.int8), "3 layers, expected all num_layers=4 or the 2"),
        (([[[1, 2, 3]] * 2], [[[1, 2, 3]] * 4]), "the parts have shapes"),
    ],
)
def test_what_is_no_payload_is_refused(payload, message):
    """The message says what came and what was expected."""
    with pytest.raises(RoutesError, match=message):
        decode(payload, **make().sizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_bad_rows": "ignore"}, "on_bad_rows is 'ignore'"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"moe_layers": ()}, "expected ascending layer numbers from 1 to 4"),
        ({"moe_layers": (4, 2)}, "expected ascending layer numbers"),
        ({"moe_layers": (2, 5)}, "expected ascending layer numbers from 1 to 4"),
        ({"topk": 21}, "topk is 21 with 20 experts"),
        ({"num_tokens": -1}, "with -1 tokens"),
    ],
)
def test_impossible_arguments_are_refused(changes, message):
    """Wrong sizes are told apart from a wrong payload."""
    sample = make()
    with pytest.raises(RoutesError, match=message):
        decode(FORMATS["sglang"](sample), **(sample.sizes | changes))


# Bad rows


def damaged(change) -> Sample:
    sample = make(num_tokens=6, topk=3, num_experts=20)
    change(sample.rows)
    return sample


def zero_row(rows):
    rows[2, 1] = 0


def physical_id(rows):
    rows[2, 1, 0] = 23


def partly_missing(rows):
    rows[2, 1, 0] = -1


def repeated_id(rows):
    rows[2, 1, 0] = rows[2, 1, 2]


BAD = [
    (zero_row, "A row of zeros was never captured: prefill/decode disaggregation"),
    (physical_id, "below num_experts=20: these may be physical ids"),
    (partly_missing, "-1 as a whole .missing. or not at all"),
    (repeated_id, "An id is there twice"),
]


@pytest.mark.parametrize(("change", "cause"), BAD)
def test_a_bad_row_is_named_with_its_likely_cause(change, cause):
    """Sample, token, layer and ids, and what in the engine makes such rows."""
    sample = damaged(change)
    ids = str(sample.rows[2, 1].tolist()).replace("[", r"\[").replace("]", r"\]")
    where = rf"^a3: 1 of 10 rows are bad, the first at token 2, layer 4: experts {ids}\. .*"
    with pytest.raises(RoutesError, match=where + cause):
        decode(FORMATS["sglang"](sample), **sample.sizes, name="a3")


@pytest.mark.parametrize(("change", "cause"), BAD)
def test_bad_rows_can_be_marked_counted_and_logged(change, cause, caplog):
    """on_bad_rows="invalid" loses that row of that layer, and says so."""
    sample = damaged(change)
    routes = decode(FORMATS["sglang"](sample), **sample.sizes, on_bad_rows="invalid", name="a3")
    assert routes.bad_rows == 1
    assert routes.invalid_rows == 1 + len(sample.moe_layers)
    assert routes.valid[2].tolist() == [True, False]
    assert routes.experts[2, 1].tolist() == [0, 0, 0]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "a3: 1 of 10 rows are bad" in record.getMessage()
    assert record.getMessage().endswith("They are marked invalid.")


def test_the_token_of_a_bad_row_counts_from_the_start_of_the_sample():
    """With an offset the message still names the token, not the payload's row."""
    sample = damaged(zero_row)
    sent = b64(sample.all_layers()[1:].astype("<i4").tobytes())
    with pytest.raises(RoutesError, match="first at token 2, layer 4"):
        decode(sent, **sample.sizes, start=1)


def test_rows_of_minus_one_are_missing_not_bad(caplog):
    """TensorRT-LLM and NeMo-RL say "no routes for this row" by -1."""
    sample = make(num_tokens=6)
    sample.rows[1:3] = -1
    sample.rows[4, 0] = -1
    for name in ("tensorrt-llm", "nemo", "sglang"):
        routes = decode(FORMATS[name](sample), **sample.sizes)
        assert routes.bad_rows == 0
        assert routes.valid.tolist() == [
            [True, True], [False, False], [False, False], [True, True], [False, True],
            [False, False],
        ]  # fmt: skip
    assert not caplog.records


def test_a_layer_of_zeros_was_never_captured():
    """A dense layer taken for a MoE layer, or a kernel without capture: the layers are named."""
    sample = make(num_tokens=6, moe_layers=(2, 4))
    sizes = sample.sizes | {"moe_layers": (1, 2, 3, 4)}
    message = r"10 of 20 rows are bad.*layer 1: .*Layers \[1, 3\] are zero in every row"
    with pytest.raises(RoutesError, match=message):
        decode(FORMATS["sglang"](sample), **sizes)
    routes = decode(FORMATS["sglang"](sample), **sizes, on_bad_rows="invalid")
    assert routes.bad_rows == 10
    assert routes.select((2, 4)) == sample.routes


def test_top_1_takes_zeros_until_a_layer_holds_nothing_else():
    """With topk 1 expert 0 is a legal row; a whole layer of it is a layer without capture."""
    sample = make(num_tokens=100, topk=1)
    assert decode(FORMATS["sglang"](sample), **sample.sizes) == sample.routes
    sample.rows[:, 1] = 0
    with pytest.raises(RoutesError, match=r"99 of 198 rows are bad.*Layers \[4\] are zero"):
        decode(FORMATS["sglang"](sample), **sample.sizes)
    short = make(num_tokens=5, topk=1)
    short.rows[:, 1] = 0
    assert decode(FORMATS["sglang"](short), **short.sizes) == short.routes


def test_bad_rows_of_a_long_sample_are_all_counted():
    """Rows are checked in blocks; bad ones are found in each."""
    sample = make(num_tokens=30_000, num_layers=3, moe_layers=(1, 3), topk=8, num_experts=64)
    sample.rows[::1000, 1] = 0
    for name in ("sglang", "vllm narrow npy", "vllm array"):
        routes = decode(FORMATS[name](sample), **sample.sizes, on_bad_rows="invalid")
        assert routes.bad_rows == 30
        assert (~routes.valid[:, 1]).nonzero().flatten().tolist() == [
            *range(0, 30_000, 1000), 29_999
        ]  # fmt: skip


def test_a_long_run_of_equal_rows_warns(caplog):
    """A stale capture buffer repeats a row; the row itself is legal."""
    sample = make(num_tokens=60)
    sample.rows[20:40] = sample.rows[20]
    assert decode(FORMATS["sglang"](sample), **sample.sizes, name="a3") == sample.routes
    [record] = caplog.records
    assert "a3: the 20 rows of tokens 20 to 39 are equal in every layer" in record.getMessage()


def test_equal_rows_in_one_layer_do_not_warn(caplog):
    """Neighbours may agree in a layer; only rows equal in every layer are suspicious."""
    sample = make(num_tokens=60)
    sample.rows[20:40, 0] = sample.rows[20, 0]
    decode(FORMATS["sglang"](sample), **sample.sizes)
    decode("", **sample.sizes, start=59)
    assert not caplog.records


def test_the_input_is_left_alone():
    """decode writes to none of its inputs."""
    sample = make()
    sample.rows[1, 0] = 0
    tensor, array = torch.from_numpy(sample.all_layers()), sample.all_layers()
    for payload in (tensor, array):
        decode(payload, **sample.sizes, on_bad_rows="invalid")
        assert np.array_equal(np.asarray(payload), sample.all_layers())
