"""spread_rows: padding that loads no expert and no rank more than another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r3patch import RoutesError
from r3patch.rows.spread import spread_missing, spread_rows


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """Any block size, expert-parallel size, topk, number of rows and start."""
    ep_size = draw(st.sampled_from([1, 2, 4, 8]))
    num_experts = ep_size * draw(st.integers(1, 40))
    topk = draw(st.integers(1, num_experts))
    return draw(st.integers(0, 70)), topk, num_experts, draw(st.integers(0, 1000)), ep_size


def difference(loads: torch.Tensor) -> int:
    return int(loads.max() - loads.min())


@settings(max_examples=300, deadline=None)
@given(sizes())
def test_loads_differ_by_one_at_most(case: Any) -> None:
    """Over experts and over expert-parallel ranks, whatever the number of rows."""
    num_rows, topk, num_experts, first, ep_size = case
    rows = spread_rows(num_rows, topk, num_experts, first=first, ep_size=ep_size)
    loads = torch.bincount(rows.flatten(), minlength=num_experts)
    assert difference(loads) <= 1
    assert difference(loads.view(ep_size, -1).sum(1)) <= 1


@settings(max_examples=200, deadline=None)
@given(sizes())
def test_rows_are_routes(case: Any) -> None:
    """Every row has topk distinct ids in range, as int64."""
    num_rows, topk, num_experts, first, ep_size = case
    rows = spread_rows(num_rows, topk, num_experts, first=first, ep_size=ep_size)
    assert rows.dtype == torch.int64
    assert rows.shape == (num_rows, topk)
    assert all(len(set(row)) == topk for row in rows.tolist())
    assert not rows.numel() or 0 <= int(rows.min()) <= int(rows.max()) < num_experts


@settings(max_examples=100, deadline=None)
@given(sizes(), st.integers(0, 30))
def test_first_goes_on_where_earlier_rows_ended(case: Any, more: Any) -> None:
    """Filling in two steps gives the rows of one step."""
    num_rows, topk, num_experts, first, ep_size = case
    whole = spread_rows(num_rows + more, topk, num_experts, first=first, ep_size=ep_size)
    start = spread_rows(num_rows, topk, num_experts, first=first, ep_size=ep_size)
    rest = spread_rows(more, topk, num_experts, first=first + num_rows, ep_size=ep_size)
    assert torch.equal(whole, torch.cat([start, rest]))


@pytest.mark.parametrize(
    ("topk", "experts", "ep_size", "message"),
    [
        (9, 8, 1, "topk is 9 with 8 experts"),
        (0, 8, 1, "topk is 0"),
        (2, 8, 3, "ep_size=3 does not divide num_experts=8"),
        (2, 8, 0, "ep_size=0"),
    ],
)
def test_sizes_that_cannot_be_spread_are_refused(
    topk: int, experts: Any, ep_size: int, message: Any
) -> None:
    """Repeated experts in a row are never the answer."""
    with pytest.raises(RoutesError, match=message):
        spread_rows(4, topk, experts, ep_size=ep_size)


def test_layers_go_on_where_the_layer_before_ended() -> None:
    """The same gaps in two layers load other experts."""
    rows, gaps = torch.zeros(2, 4, 2, dtype=torch.uint8), torch.arange(4)
    spread_missing(rows, [gaps, gaps], [16, 16])
    assert sorted(rows.flatten().tolist()) == list(range(16))
