"""Layout: fields that no batch can have, microbatches that do not fit, and what Megatron says."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from engines import routes

from r3patch import Layout, RoutesError


def sample(number: int, length: int) -> Any:
    return routes(length, layers=(2, 5), seed=number)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tp_rank": 1}, "tp_rank=1 does not exist with tp_size=1"),
        ({"cp_size": 2, "cp_rank": 2}, "cp_rank=2 does not exist with cp_size=2"),
        ({"cp_size": 0}, "cp_size=0"),
        ({"cp_order": "ring"}, "cp_order is 'ring'"),
        ({"align": 0}, "align=0"),
        ({"pack_length": 0}, "pack_length=0"),
        ({"pack_length": 8, "pad_to_multiple": 2}, "one of the two"),
        ({"prompt_width": 2}, "belong to padded batches"),
        ({"packed": False, "seq_length": 8, "pack_length": 8}, "belong to packed batches"),
        ({"packed": False, "seq_length": 8, "tail_in_last_sample": True}, "belong to packed b"),
        ({"packed": False, "seq_length": 8, "prompt_width": 9}, "expected 0 to seq_length=8"),
        ({"packed": False, "seq_length": 8, "prompt_width": -1}, "prompt_width=-1"),
        (
            {"packed": False, "seq_length": 8, "prompt_width": 4, "padding_side": "left"},
            "without padding_side",
        ),
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


def test_tensor_parallel_ranks_without_sequence_parallelism_cut_nothing() -> None:
    """They hold the same tokens, so a row need not be a multiple of tp_size."""
    layout = Layout(packed=False, seq_length=6, tp_size=4, tp_rank=3)
    assert layout.place([sample(0, 5)]).num_tokens == 6


def test_a_pack_longer_than_its_length_is_refused() -> None:
    """An absolute length is no multiple: what does not fit is not cut."""
    with pytest.raises(RoutesError, match="have 6 tokens, more than pack_length=5"):
        Layout(pack_length=5).place([sample(0, 3), sample(1, 3)])


def test_a_tail_that_the_last_sample_cannot_have_is_refused() -> None:
    """The last sample is cut into 2 * cp_size chunks with the tail in it."""
    layout = Layout(cp_size=2, pack_length=10, tail_in_last_sample=True)
    with pytest.raises(RoutesError, match="the last sample has 6 tokens with the tail"):
        layout.place([sample(0, 4), sample(1, 3)])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompt_width=3 and prompts=None: one needs the other"),
        ([1], "1 prompt lengths for 2 samples"),
        ([4, 1], "sample 0 has 4 prompt tokens of 5: they do not fit prompt_width=3"),
        ([1, 1], "sample 0 has 1 prompt tokens of 5"),
        ([2, 3], "sample 1 has 3 prompt tokens of 2"),
        ([2, -1], "sample 1 has -1 prompt tokens"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts: list[int] | None, message: str) -> None:
    """Prompt and response each have their own width in the row."""
    layout = Layout(packed=False, seq_length=6, prompt_width=3)
    with pytest.raises(RoutesError, match=message):
        layout.place([sample(0, 5), sample(1, 2)], prompts)


def test_prompts_without_a_width_are_refused() -> None:
    """They would be ignored in silence."""
    with pytest.raises(RoutesError, match=r"prompt_width=None and prompts=\[1\]"):
        Layout().place([sample(0, 3)], [1])


def test_parts_that_are_not_this_layouts_are_refused() -> None:
    """unplace wants every rank's part, of the size that the rank has."""
    layout = Layout(cp_size=2)
    parts = [Layout(cp_size=2, cp_rank=rank).place([sample(0, 8)]) for rank in (0, 1)]
    with pytest.raises(RoutesError, match=r"got 1 parts, expected one for each of 2"):
        layout.unplace(parts[:1], [8])
    with pytest.raises(RoutesError, match=r"part 0 has 4 rows, .* its rank 6 of samples of \[9\]"):
        layout.unplace(parts, [9])
    with pytest.raises(RoutesError, match=r"part 1 has 6 rows, .* its rank 4 of samples of \[8\]"):
        layout.unplace([parts[0], Layout().place([sample(0, 6)])], [8])
    with pytest.raises(RoutesError, match=r"got none"):
        layout.unplace([], [8])


@pytest.mark.parametrize(
    "values",
    [
        [],
        [torch.tensor(1.0)],
        [torch.zeros(2), torch.zeros(2, 1)],
        [torch.zeros(2), torch.zeros(2, dtype=torch.int64)],
    ],
)
def test_values_of_different_kinds_are_refused(values: list[torch.Tensor]) -> None:
    """torch.cat would promote some of them in silence."""
    with pytest.raises(RoutesError, match="values are one"):
        Layout().place_values(values)


@pytest.mark.parametrize(
    "fields", [{}, {"cp_size": 2, "cp_rank": 1}, {"packed": False, "seq_length": 8}]
)
def test_values_stay_on_their_device(fields: dict[str, Any]) -> None:
    """Log-probs on a GPU are placed there: of the meta device nothing can come to the host."""
    values = [torch.zeros(length, 2, device="meta") for length in (5, 3)]
    placed = Layout(**fields).place_values(values)
    assert placed.device.type == "meta"
    ids = [torch.zeros(length, dtype=torch.int64, device="meta") for length in (5, 3)]
    assert Layout(**fields).place_ids(ids).shape == placed.shape[:1]


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
