"""Routes.join: how parts of one sequence become a whole."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from engines import routes
from hypothesis import given, settings
from hypothesis import strategies as st

from r3patch import Routes, RoutesError


def test_join_takes_the_longest_part_and_fills_its_gaps() -> None:
    """The last row of a turn is unknown until the next turn's prefill feeds that token."""
    whole = routes(6)
    turn = torch.arange(6) < 3
    first = Routes(whole.experts, whole.layers, turn, num_experts=8)[:4]
    second = Routes(whole.experts, whole.layers, ~turn, num_experts=8)
    assert Routes.join([first, second]) == whole
    assert Routes.join([second, first]) == whole


@pytest.mark.parametrize(("keep", "winner"), [("first", 0), ("latest", 1)])
def test_join_follows_the_policy_where_parts_differ(keep: Any, winner: int) -> None:
    """first keeps what generated the tokens, latest what the last prefill chose."""
    parts = [routes(5, seed=1), routes(5, seed=2)]
    assert Routes.join(parts, keep=keep) == parts[winner]


def test_join_latest_does_not_let_a_gap_erase_rows() -> None:
    """A row is taken from the latest part that has it."""
    old = routes(4, seed=1)
    new = Routes(routes(4, seed=2).experts, old.layers, [False, True, True, False], num_experts=8)
    joined = Routes.join([old, new], keep="latest")
    assert joined.valid is None
    assert joined.experts[[0, 3]].tolist() == old.experts[[0, 3]].tolist()
    assert joined.experts[[1, 2]].tolist() == new.experts[[1, 2]].tolist()


def test_join_without_a_policy_refuses_parts_that_differ() -> None:
    """Which row counts is the user's choice."""
    parts = [routes(5, seed=1), routes(5, seed=2)]
    with pytest.raises(RoutesError, match=r'part 1 disagrees .* layer .* keep="first" or keep='):
        Routes.join(parts)


def test_join_takes_another_order_of_ids_for_agreement() -> None:
    """Engines order the ids of a row as they like."""
    whole = routes(5)
    shuffled = Routes(whole.experts.flip(-1), whole.layers, num_experts=8)
    assert Routes.join([whole, shuffled]) == whole


def test_join_merges_the_layers_of_pipeline_stages() -> None:
    """Stages have the same tokens and other layers."""
    whole = routes(5, layers=(2, 3, 5, 8))
    assert Routes.join([whole.select((2, 3)), whole.select((5, 8))]) == whole
    assert Routes.join([whole.select((5, 8)), whole.select((2, 3))]).select(whole.layers) == whole


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_join_agrees_with_a_row_by_row_definition(data: st.DataObject) -> None:
    """Every row comes from the first or latest part in which it is valid."""
    keep: Literal["first", "latest"] = data.draw(st.sampled_from(["first", "latest"]))
    parts = []
    for seed in range(data.draw(st.integers(1, 3))):
        layers = data.draw(st.permutations((1, 2, 3)))[: data.draw(st.integers(1, 3))]
        tokens = data.draw(st.integers(0, 4))
        full = routes(tokens, layers, seed=seed)
        flags = st.lists(st.booleans(), min_size=len(layers), max_size=len(layers))
        valid = torch.tensor([data.draw(flags) for _ in range(tokens)], dtype=torch.bool)
        valid = valid.view(tokens, len(layers))
        parts.append(Routes(full.experts, layers, valid, num_experts=8))
    joined = Routes.join(parts, keep=keep)
    assert joined.num_tokens == max(part.num_tokens for part in parts)
    assert set(joined.layers) == {layer for part in parts for layer in part.layers}
    order = parts if keep == "latest" else parts[::-1]
    for token in range(joined.num_tokens):
        for column, layer in enumerate(joined.layers):
            want = None
            for part in order:
                if token < part.num_tokens and layer in part.layers:
                    at = part.layers.index(layer)
                    if part.valid is None or part.valid[token, at]:
                        want = part.experts[token, at].tolist()
            known = joined.valid is None or bool(joined.valid[token, column])
            assert known == (want is not None)
            assert joined.experts[token, column].tolist() == (want or [0, 0])


@pytest.mark.parametrize(
    ("parts", "keep", "message"),
    [
        ([], "error", "got no parts"),
        ([routes()], "last", "keep is 'last'"),
        ([routes(), routes(topk=3)], "first", r"differ in \(topk, num_experts\)"),
        ([routes(), routes(experts=9)], "first", r"differ in \(topk, num_experts\)"),
    ],
)
def test_join_refuses_what_it_cannot_join(parts: list[Routes], keep: Any, message: str) -> None:
    """Parts of different models do not make one sample."""
    with pytest.raises(RoutesError, match=message):
        Routes.join(parts, keep=keep)
