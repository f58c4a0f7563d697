"""decode: what is no payload is refused, by RoutesError and nothing else."""

from __future__ import annotations

import base64
import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from engines import FORMATS, Sample, b64, make, npy, samples
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from r3patch import RoutesError, decode

# Mutations: refused, or the same routes


def same_or_refused(payload: object, sample: Sample) -> None:
    with contextlib.suppress(RoutesError):
        assert decode(payload, **sample.sizes) == sample.routes


BYTES = ["sglang", "vllm int32 npy", "vllm narrow npy", "nemo", "sglang with dtype"]


@pytest.mark.parametrize("name", BYTES)
def test_truncated_and_extended_text_is_refused(name: str) -> None:
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
def test_bytes_lost_or_added_are_refused(sample: Sample, change: Any) -> None:
    """The same on the bytes below the base64."""
    raw = sample.all_layers().astype("<i4").tobytes()
    same_or_refused(b64(raw[:change] if change < 0 else raw + b"\x01" * change), sample)


@settings(max_examples=150, deadline=None)
@given(samples(), st.sampled_from(["<i2", "<i8", "<u1", "<f4", ">i4"]))
def test_another_dtype_than_int32_is_refused(sample: Sample, dtype: str) -> None:
    """A flat payload is int32 unless it says otherwise."""
    assume(dtype != "<u1" or sample.num_experts <= 256)
    same_or_refused(b64(sample.all_layers().astype(dtype).tobytes()), sample)


@settings(max_examples=200, deadline=None)
@given(samples(), st.data())
def test_wrong_topk_or_num_layers_are_refused(sample: Sample, data: st.DataObject) -> None:
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
def test_bytes_out_of_step_are_refused(sample: Sample, step: int) -> None:
    """Bytes shifted against the ids give ids of millions."""
    raw = sample.all_layers().astype("<i4").tobytes()
    same_or_refused(b64(raw[step:] + raw[:step]), sample)


@settings(max_examples=100, deadline=None)
@given(samples(), st.data())
def test_one_id_changed_is_refused_or_another_route(sample: Sample, data: st.DataObject) -> None:
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
def test_noise_is_refused(text: Any) -> None:
    """Nothing but RoutesError comes out of noise."""
    sample = make()
    with pytest.raises(RoutesError):
        decode(text, **sample.sizes)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_changed_npy_byte_raises_nothing_but_routes_error(data: st.DataObject) -> None:
    """A damaged header does not surface as numpy's error."""
    raw = bytearray(base64.b64decode(FORMATS["vllm narrow npy"](make())))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(RoutesError):
        decode(b64(bytes(raw)), **make().sizes)


def test_a_npy_of_python_objects_is_not_unpickled() -> None:
    """allow_pickle stays off."""
    with pytest.raises(RoutesError, match=r"\.npy payload is damaged: Object arrays"):
        decode(npy(np.array([[[object()]]])), **make().sizes)


# Malformed payloads


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (None, "returned no routes .None.*aborted.*Routes.missing"),
        (5, "type int is none of the formats"),
        ({"experts": []}, r"a mapping with keys \['experts'\] has no routes.*--enable-return"),
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
def test_what_is_no_payload_is_refused(payload: Any, message: str) -> None:
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
        ({"num_tokens": -1}, "num_tokens is -1, expected 0 or more"),
    ],
)
def test_impossible_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    """Wrong sizes are told apart from a wrong payload."""
    sample = make()
    with pytest.raises(RoutesError, match=message):
        decode(FORMATS["sglang"](sample), **(sample.sizes | changes))
