"""Routes: what it accepts and what it keeps."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import routes
from hypothesis import given, settings
from hypothesis import strategies as st

from r3patch import Routes, RoutesError

# Construction


@pytest.mark.parametrize(
    ("experts", "dtype"),
    [(255, torch.uint8), (256, torch.uint8), (257, torch.int16), (32768, torch.int16)],
)
def test_ids_are_stored_as_narrowly_as_they_fit(experts: int, dtype: torch.dtype) -> None:
    """One byte per id up to 256 experts, two above, and the greatest id survives."""
    kept = Routes([[[0, experts - 1]]], (1,), num_experts=experts)
    assert kept.experts.dtype == dtype
    assert kept.experts.tolist() == [[[0, experts - 1]]]


@pytest.mark.parametrize(
    "dtype",
    ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"],
)
def test_every_integer_dtype_is_taken(dtype: str) -> None:
    """The dtype of the input makes no difference."""
    ids = torch.tensor([[[0, 7]], [[3, 1]]])
    assert Routes(ids.to(getattr(torch, dtype)), (1,), num_experts=8) == Routes(
        ids, (1,), num_experts=8
    )


@pytest.mark.parametrize("bad", [-1, 300, 256, 2**40])
def test_an_id_out_of_range_is_named_before_it_is_narrowed(bad: int) -> None:
    """An id that wraps to a legal one when narrowed is still refused."""
    with pytest.raises(RoutesError, match=rf"token 1, layer 4: experts \[0, {bad}\], expected 2"):
        Routes([[[0, 1]], [[0, bad]]], (4,), num_experts=256)


def test_a_uint8_row_is_not_compared_with_a_wrapped_bound() -> None:
    """256 experts beside uint8 ids: torch would compare with 256 modulo 256."""
    ids = torch.tensor([[[0, 255]], [[1, 2]]], dtype=torch.uint8)
    assert Routes(ids, (1,), num_experts=256).invalid_rows == 0
    with pytest.raises(RoutesError, match=r"token 1, layer 1: experts \[2, 2\].* 1 of 2 rows"):
        Routes(torch.tensor([[[0, 255]], [[2, 2]]], dtype=torch.uint8), (1,), num_experts=256)


def test_an_id_twice_in_a_row_is_refused() -> None:
    """A router needs topk distinct experts; the dispatcher counts tokens times topk."""
    with pytest.raises(RoutesError, match=r"token 0, layer 9: experts \[5, 2, 5\].*1 of 2 rows"):
        Routes([[[1, 2, 3], [5, 2, 5]]], (1, 9), num_experts=8)


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_repeats_are_found_as_a_set_would_find_them(num_tokens: int, topk: int, seed: int) -> None:
    """The vectorised check agrees with Python's sets."""
    ids = torch.randint(0, 16, (num_tokens, 1, topk), generator=torch.Generator().manual_seed(seed))
    repeated = any(len(set(row)) < topk for row in ids[:, 0].tolist())
    if repeated:
        with pytest.raises(RoutesError, match="distinct ids"):
            Routes(ids, (1,), num_experts=16)
    else:
        assert Routes(ids, (1,), num_experts=16).experts.tolist() == ids.tolist()


def test_a_repeat_far_into_a_long_sample_is_found() -> None:
    """Rows are checked in blocks; the last block counts too."""
    ids = torch.stack([torch.arange(8).roll(i) for i in range(8)]).repeat(10_001, 1)[:, None]
    Routes(ids, (1,), num_experts=8)
    ids[-1, 0, 0] = ids[-1, 0, 1]
    with pytest.raises(RoutesError, match=r"token 80007, layer 1: .* 1 of 80008 rows"):
        Routes(ids, (1,), num_experts=8)


def test_content_of_invalid_rows_is_ignored_and_zeroed() -> None:
    """Whatever stood in an invalid row, equal routes are equal."""
    wild = Routes([[[0, 1]], [[-1, 900]]], (1,), [True, False], num_experts=8)
    tame = Routes([[[0, 1]], [[3, 3]]], (1,), [[True], [False]], num_experts=8)
    assert wild == tame
    assert wild.experts[1].tolist() == [[0, 0]]


def test_valid_per_token_counts_for_every_layer() -> None:
    """A [num_tokens] mask is spread over the layers."""
    part = Routes(torch.tensor([[[1, 2]] * 3] * 2), (1, 2, 3), [False, True], num_experts=8)
    assert part.mask.tolist() == [[False] * 3, [True] * 3]
    assert part.invalid_rows == 3


def test_all_valid_is_the_same_as_none() -> None:
    """There is one form for "every row is valid"."""
    ids = [[[0, 1]]]
    marked = Routes(ids, (1,), [True], num_experts=8)
    assert marked.valid is None
    assert marked == Routes(ids, (1,), num_experts=8)


def test_the_input_is_copied() -> None:
    """Later writes into the caller's tensors change nothing."""
    ids = torch.tensor([[[0, 1]], [[2, 3]]], dtype=torch.uint8)
    valid = torch.tensor([[True], [False]])
    kept = Routes(ids, (1,), valid, num_experts=8)
    ids.fill_(7)
    valid.fill_(True)
    assert kept.experts.tolist() == [[[0, 1]], [[0, 0]]]
    assert kept.mask.tolist() == [[True], [False]]
    assert ids.tolist() == [[[7, 7]], [[7, 7]]]


def test_read_only_arrays_are_taken_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    """Arrays out of a shared store are read-only."""
    array = np.frombuffer(np.arange(8, dtype=np.uint16).tobytes(), np.uint16).reshape(2, 2, 2)
    assert not array.flags.writeable
    assert Routes(array, (1, 2), num_experts=300).experts.tolist() == array.tolist()
    assert not recwarn.list


@pytest.mark.parametrize(("tokens", "layers"), [(0, (1,)), (1, (1,)), (3, ()), (0, ())])
def test_empty_sizes_are_legal(tokens: int, layers: tuple[int, ...], tmp_path: Path) -> None:
    """A sample of no tokens and a rank without MoE layers go through every method."""
    empty = Routes(torch.zeros(tokens, len(layers), 1, dtype=torch.int8), layers, num_experts=1)
    empty.save(tmp_path / "routes.pt")
    assert Routes.load(tmp_path / "routes.pt") == empty
    assert Routes.join([empty, empty]) == empty == empty.select(layers) == empty[:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": [[1, 2]]}, r"shape \(1, 2\), expected \[num_tokens, num_layers, topk\]"),
        ({"experts": [[[1.0, 2.0]]]}, "dtype torch.float32, expected integer"),
        ({"experts": torch.ones(1, 1, 2, dtype=torch.bool)}, "dtype torch.bool"),
        ({"experts": [[[1, 2], [3]]]}, "cannot be made a tensor"),
        ({"layers": (1, 2)}, "has 1 layers .* but layers names 2"),
        ({"layers": (0,)}, "1-based Megatron layer numbers"),
        ({"layers": (True,)}, "1-based Megatron layer numbers"),
        ({"experts": [[[1, 2]] * 2], "layers": (3, 3)}, r"names \[3\] more than once"),
        ({"valid": [True, True]}, r"valid has shape \(2,\), expected \[1\] or \[1, 1\]"),
        ({"valid": [1]}, "valid has dtype torch.int64, expected bool"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": 40_000}, "num_experts is 40000, expected 1 to 32768"),
        ({"num_experts": 1}, "topk is 2 with 1 experts"),
        ({"experts": torch.zeros(1, 1, 0, dtype=torch.int8)}, "topk is 0"),
    ],
)
def test_malformed_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    """Each refusal says what was got and what was expected."""
    good: dict[str, Any] = {"experts": [[[1, 2]]], "layers": (1,), "num_experts": 8}
    with pytest.raises(RoutesError, match=message):
        Routes(**(good | arguments))


# Parts


def test_missing_has_no_valid_row() -> None:
    """An aborted sample takes part in its microbatch without routes."""
    gone = Routes.missing(4, (2, 3), 2, 8)
    assert (gone.num_tokens, gone.layers, gone.topk, gone.invalid_rows) == (4, (2, 3), 2, 8)


def test_select_keeps_the_asked_order_and_validity() -> None:
    """Columns follow their layer numbers, not their places."""
    whole = Routes([[[0, 1], [2, 3], [4, 5]]], (2, 3, 5), [[True, False, True]], num_experts=8)
    part = whole.select((5, 3))
    assert part.layers == (5, 3)
    assert part.experts.tolist() == [[[4, 5], [0, 0]]]
    assert part.mask.tolist() == [[True, False]]


def test_select_names_layers_without_a_column() -> None:
    """Asking for a dense or an MTP layer is a mistake, not an empty answer."""
    with pytest.raises(RoutesError, match=r"no routes for layers \[1, 4\]: .* \(2, 3, 5\)"):
        routes().select((1, 2, 4))


def test_tokens_are_taken_by_slice_mask_and_position() -> None:
    """Truncation and dropped tokens keep rows and tokens aligned."""
    whole = routes(6)
    mask = torch.tensor([True, False, True, True, False, True])
    assert whole[:4].experts.tolist() == whole.experts[:4].tolist()
    assert whole[mask] == whole[mask.nonzero().squeeze(1)]
    assert whole[mask].experts.tolist() == whole.experts[mask].tolist()


@pytest.mark.parametrize("index", [0, torch.tensor([0, 1], dtype=torch.uint8), [0, 1]])
def test_an_index_with_another_meaning_is_refused(index: Any) -> None:
    """torch reads uint8 as a mask, and an int would drop the token axis."""
    with pytest.raises(RoutesError, match="expected a slice, a bool mask or an int64 tensor"):
        routes()[index]


def test_parts_own_their_memory() -> None:
    """Pickling a part sends the part: views would drag the whole storage along."""
    whole = routes(1000)
    for part in (whole[:10], whole.select((3,)), whole[10:20].select((5, 2))):
        assert part.experts.untyped_storage().nbytes() == part.experts.nbytes
    assert len(pickle.dumps(whole[:10])) < 1500


def test_pickle_keeps_routes() -> None:
    """Routes travel between processes."""
    whole = Routes([[[0, 1]], [[2, 3]]], (4,), [True, False], num_experts=8)
    sent = pickle.dumps(whole)
    assert pickle.loads(sent) == whole
    assert b"r3patch.rows" not in sent  # files may move


def test_mask_is_always_a_tensor() -> None:
    """A reader of validity need not know that None stands for "every row"."""
    assert routes(2).mask.tolist() == [[True] * 3] * 2
    gone = Routes.missing(2, (2, 3), 2, 8)
    assert gone.mask is gone.valid


def test_a_row_of_minus_one_is_missing() -> None:
    """As decode has it: whole rows of -1 have no routes, and valid rows beside them count."""
    part = Routes([[[-1, -1], [1, 2]], [[3, 4], [5, 6]]], (1, 2), [True, False], num_experts=8)
    assert part.mask.tolist() == [[False, True], [False, False]]
    assert part.experts.tolist() == [[[0, 0], [1, 2]], [[0, 0], [0, 0]]]
    with pytest.raises(RoutesError, match=r"experts \[-1, 2\]"):
        Routes([[[-1, 2]]], (1,), num_experts=8)


# Comparison


@pytest.mark.parametrize(
    "other",
    [
        routes(seed=3),
        routes(5),
        routes(layers=(2, 3, 6)),
        routes(experts=9),
        routes()[:0],
        Routes(routes().experts, (2, 3, 5), torch.arange(6) < 5, num_experts=8),
        None,
        "routes",
    ],
)
def test_unequal_routes_are_unequal(other: object) -> None:
    """Any difference in content counts."""
    assert routes() != other


def test_repr_tells_the_sizes() -> None:
    """A repr names sizes and gaps, not sixteen megabytes of ids."""
    text = repr(Routes.missing(3, range(4, 62), 8, 256))
    assert text == (
        "Routes(num_tokens=3, layers=(4..61), topk=8, num_experts=256, invalid_rows=174)"
    )


def test_rows_that_repeat_an_id_are_all_found() -> None:
    """Whether the two stand side by side or apart."""
    with pytest.raises(RoutesError, match=r"expected 3 distinct ids .* 2 of 3 rows are like this"):
        Routes([[[4, 4, 1]], [[0, 1, 2]], [[2, 3, 2]]], (1,), num_experts=5)
