"""decode: rows that cannot be routes, by name, number and likely cause."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from engines import FORMATS, Array, Sample, b64, make

from r3patch import RoutesError, decode

# Bad rows


def damaged(change: Callable[[Array], None]) -> Sample:
    sample = make(num_tokens=6, topk=3, num_experts=20)
    change(sample.rows)
    return sample


def zero_row(rows: Array) -> None:
    rows[2, 1] = 0


def physical_id(rows: Array) -> None:
    rows[2, 1, 0] = 23


def partly_missing(rows: Array) -> None:
    rows[2, 1, 0] = -1


def repeated_id(rows: Array) -> None:
    rows[2, 1, 0] = rows[2, 1, 2]


def physical_id_just_outside(rows: Array) -> None:
    rows[2, 1, 0] = 20


BAD = [
    (physical_id_just_outside, "below num_experts=20: these may be physical ids"),
    (zero_row, "A row of zeros was never captured: prefill/decode disaggregation"),
    (physical_id, "below num_experts=20: these may be physical ids"),
    (partly_missing, "-1 as a whole .missing. or not at all"),
    (repeated_id, "An id is there twice"),
]


@pytest.mark.parametrize(("change", "cause"), BAD)
def test_a_bad_row_is_named_with_its_likely_cause(
    change: Callable[[Array], None], cause: str
) -> None:
    """Sample, token, layer and ids, and what in the engine makes such rows."""
    sample = damaged(change)
    ids = str(sample.rows[2, 1].tolist()).replace("[", r"\[").replace("]", r"\]")
    where = rf"^a3: 1 of 10 rows are bad, the first at token 2, layer 4: experts {ids}\. .*"
    with pytest.raises(RoutesError, match=where + cause):
        decode(FORMATS["sglang"](sample), **sample.sizes, name="a3")


@pytest.mark.parametrize(("change", "cause"), BAD)
def test_bad_rows_can_be_marked_counted_and_logged(
    change: Callable[[Array], None], cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    """on_bad_rows="invalid" loses that row of that layer, and says so."""
    sample = damaged(change)
    routes = decode(FORMATS["sglang"](sample), **sample.sizes, on_bad_rows="invalid", name="a3")
    assert routes.bad_rows == 1
    assert routes.invalid_rows == 1 + len(sample.moe_layers)
    assert routes.mask[2].tolist() == [True, False]
    assert routes.experts[2, 1].tolist() == [0, 0, 0]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "a3: 1 of 10 rows are bad" in record.getMessage()
    assert record.getMessage().endswith("They are marked invalid.")


def test_the_first_bad_row_says_the_cause() -> None:
    """Later rows may be bad for other causes."""
    sample = damaged(physical_id)
    sample.rows[4, 0] = 0
    with pytest.raises(RoutesError, match=r"2 of 10 rows.*at token 2, .*may be physical ids"):
        decode(FORMATS["sglang"](sample), **sample.sizes)


def test_the_token_of_a_bad_row_counts_from_the_start_of_the_sample() -> None:
    """With an offset the message still names the token, not the payload's row."""
    sample = damaged(zero_row)
    sent = b64(sample.all_layers()[1:].astype("<i4").tobytes())
    with pytest.raises(RoutesError, match="first at token 2, layer 4"):
        decode(sent, **sample.sizes, start=1)


def test_rows_of_minus_one_are_missing_not_bad(caplog: pytest.LogCaptureFixture) -> None:
    """TensorRT-LLM and NeMo-RL say "no routes for this row" by -1."""
    sample = make(num_tokens=6)
    sample.rows[1:3] = -1
    sample.rows[4, 0] = -1
    for name in ("tensorrt-llm", "nemo", "sglang"):
        routes = decode(FORMATS[name](sample), **sample.sizes)
        assert routes.bad_rows == 0
        assert routes.mask.tolist() == [
            [True, True], [False, False], [False, False], [True, True], [False, True],
            [False, False],
        ]  # fmt: skip
    assert not caplog.records


def test_a_layer_of_zeros_was_never_captured() -> None:
    """A dense layer taken for a MoE layer, or a kernel without capture: the layers are named."""
    sample = make(num_tokens=6, moe_layers=(2, 4))
    sizes = sample.sizes | {"moe_layers": (1, 2, 3, 4)}
    message = r"10 of 20 rows are bad.*layer 1: .*Layers \[1, 3\] are zero in every row"
    with pytest.raises(RoutesError, match=message):
        decode(FORMATS["sglang"](sample), **sizes)
    routes = decode(FORMATS["sglang"](sample), **sizes, on_bad_rows="invalid")
    assert routes.bad_rows == 10
    assert routes.select((2, 4)) == sample.routes


def test_top_1_takes_zeros_until_a_layer_holds_nothing_else() -> None:
    """With topk 1 expert 0 is a legal row; a whole layer of it is a layer without capture."""
    sample = make(num_tokens=100, topk=1)
    assert decode(FORMATS["sglang"](sample), **sample.sizes) == sample.routes
    sample.rows[:, 1] = 0
    with pytest.raises(RoutesError, match=r"99 of 198 rows are bad.*Layers \[4\] are zero"):
        decode(FORMATS["sglang"](sample), **sample.sizes)
    short = make(num_tokens=5, topk=1)
    short.rows[:, 1] = 0
    assert decode(FORMATS["sglang"](short), **short.sizes) == short.routes


def test_a_dead_layer_does_not_hide_other_bad_rows() -> None:
    """With topk 1 both kinds are counted and marked."""
    sample = make(num_tokens=100, topk=1)
    sample.rows[:, 1] = 0
    sample.rows[3, 0] = 99
    routes = decode(FORMATS["sglang"](sample), **sample.sizes, on_bad_rows="invalid")
    assert routes.bad_rows == 99 + 1
    assert routes.mask[2:5].tolist() == [[True, False], [False, False], [True, False]]


def test_one_expert_is_no_dead_layer() -> None:
    """A model of one expert has zeros only."""
    sample = make(num_tokens=100, topk=1, num_experts=1)
    assert decode(FORMATS["sglang"](sample), **sample.sizes) == sample.routes


def test_bad_rows_of_a_long_sample_are_all_counted() -> None:
    """Rows are checked in blocks; bad ones are found in each."""
    sample = make(num_tokens=30_000, num_layers=3, moe_layers=(1, 3), topk=8, num_experts=64)
    sample.rows[::1000, 1] = 0
    for name in ("sglang", "vllm narrow npy", "vllm array"):
        routes = decode(FORMATS[name](sample), **sample.sizes, on_bad_rows="invalid")
        assert routes.bad_rows == 30
        assert (~routes.mask[:, 1]).nonzero().flatten().tolist() == [
            *range(0, 30_000, 1000), 29_999
        ]  # fmt: skip


def test_a_long_run_of_equal_rows_warns(caplog: pytest.LogCaptureFixture) -> None:
    """A stale capture buffer repeats a row; the row itself is legal."""
    sample = make(num_tokens=60)
    sample.rows[20:40] = sample.rows[20]
    assert decode(FORMATS["sglang"](sample), **sample.sizes, name="a3") == sample.routes
    [record] = caplog.records
    assert "a3: the 20 rows of tokens 20 to 39 are equal in every layer" in record.getMessage()


@pytest.mark.parametrize(("length", "warns"), [(15, False), (16, True)])
def test_sixteen_equal_rows_are_a_run(
    length: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As docs/rollout.md says, in a sample hardly longer too."""
    sample = make(num_tokens=20)
    sample.rows[2 : 2 + length] = sample.rows[2]
    decode(FORMATS["sglang"](sample), **sample.sizes)
    assert len(caplog.records) == warns


def test_equal_rows_in_one_layer_do_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    """Neighbours may agree in a layer; only rows equal in every layer are suspicious."""
    sample = make(num_tokens=60)
    sample.rows[20:40, 0] = sample.rows[20, 0]
    decode(FORMATS["sglang"](sample), **sample.sizes)
    decode("", **sample.sizes, start=59)
    assert not caplog.records


def test_the_input_is_left_alone() -> None:
    """decode writes to none of its inputs."""
    sample = make()
    sample.rows[1, 0] = 0
    tensor, array = torch.from_numpy(sample.all_layers()), sample.all_layers()
    for payload in (tensor, array):
        decode(payload, **sample.sizes, on_bad_rows="invalid")
        assert np.array_equal(np.asarray(payload), sample.all_layers())
