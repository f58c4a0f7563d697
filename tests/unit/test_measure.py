"""How far rows are from Megatron's own choice, and when that is alarming: answers are known."""

from __future__ import annotations

import pytest
import torch

from r3patch import ReplayError
from r3patch.sessions._alarm import Alarm
from r3patch.sessions._measure import Measure, TokenFigures

OWN = torch.tensor([[0, 1], [2, 0], [3, 2]])


def test_a_recompute_takes_the_rows_of_the_rollout() -> None:
    """Only rows that are Megatron's set now may take its order, whatever its forward chose."""
    measure = Measure(4)
    ids, in_forward = torch.tensor([[1, 0], [0, 1], [2, 3]]), torch.tensor([[0, 1], [0, 2], [3, 1]])
    assert measure.recompute(ids, OWN, in_forward).tolist() == [True, False, True]
    counts = measure.counts()
    assert (counts["recompute_rows_measured"], counts["recompute_rows_differing"]) == (3, 1)


def test_rows_that_are_not_compared_are_in_no_figure() -> None:
    """A row in a gap is counted neither as equal nor as different."""
    measure = Measure(4)
    ids = torch.tensor([[1, 0], [0, 1], [2, 3]])
    same, differs = measure.forward(ids, OWN, torch.tensor([2]))
    assert (same.tolist(), differs.tolist()) == ([True, False, True], [False, True, False])
    counts = measure.counts()
    figures = ("rows_measured", "rows_differing", "experts_shared")
    assert [counts[name] for name in figures] == [2, 1, 3]


def test_a_token_differs_where_a_layer_does() -> None:
    """One layer is enough, whichever it is, in pieces or not; a token without routes has none."""
    figures = TokenFigures(torch.tensor([True, True, True, False]))
    assert figures.codes().tolist() == [1, 1, 1, 0]
    figures.add(torch.tensor([True, False, False, False]), 0)
    figures.add(torch.tensor([False, False]), 0)
    figures.add(torch.tensor([True, False]), 2)
    assert figures.codes().tolist() == [2, 1, 2, 0]


def test_what_was_measured_goes_before_the_first_rows() -> None:
    """Rows that go wrong later in the session ring, with their own figure; and none that do not."""
    alarm = Alarm("raise")
    own = torch.rand(64, 16, generator=torch.Generator().manual_seed(0)).topk(4).indices
    alarm.add(own, own, 16)
    alarm.ring()
    alarm.ring(overlap=0.95)
    chance = alarm.agreement().chance
    assert chance is not None
    with pytest.raises(ReplayError, match=r"agree with Megatron's own choice by 0\.00 "):
        alarm.ring(chance)
    assert alarm.rang
