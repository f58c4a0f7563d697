"""What sessions, ranks and phases of a run add up to."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from r3patch.metrics import expert_load, policy_gap, route_mismatch
from r3patch.observe import trace
from r3patch.observe.stats import ReplayStats

NUM_TOKENS, NUM_EXPERTS, TOPK = 64, 16, 4


def test_ranks_of_the_same_layers_add_up(run: Any) -> None:
    """Data-parallel ranks: rows and tokens are summed; host time is that of the slowest."""
    slow = dataclasses.replace(run.stats(0, run.rollout(0, shift=1)), seconds=0.5)
    history = run.trace(
        [
            {"rank": 0, "step": 0, "stats": run.stats(0)},
            {"rank": 1, "step": 0, "stats": slow},
        ]
    )
    other = route_mismatch(run.rollout(0, shift=1), run.live(0))
    assert history.mismatch(2, 0) == (8 + other.rows_differing[0]) / 128
    assert history.tokens[0] == (128, 8 + other.tokens_differing)
    assert history.seconds[0] == 0.5
    assert not history.tokens_are_bounds


def stage(run: Any, routers: slice, codes: bytes) -> ReplayStats:
    return ReplayStats(run.stats(0).routers[routers], codes)


def test_tokens_of_pipeline_stages_are_put_together(run: Any) -> None:
    """Stages saw the same tokens: one that differs in either counts, and once."""
    first, second = bytes([2] * 8 + [1] * 56), bytes([1] * 5 + [2] * 10 + [1] * 48 + [0])
    history = run.trace(
        [
            {"rank": 0, "step": 0, "stats": stage(run, slice(0, 2), first)},
            {"rank": 1, "step": 0, "stats": stage(run, slice(2, 5), second)},
        ]
    )
    assert history.tokens[0] == (64, 15)
    assert not history.tokens_are_bounds


def test_ranks_of_two_stages_are_paired_in_their_order(run: Any) -> None:
    """Two data-parallel replicas of two stages, in both of Megatron's orders of ranks."""
    codes = {
        (0, "a"): bytes([2, 1, 1]),
        (1, "a"): bytes([1, 2, 1]),
        (0, "b"): bytes([1, 1]),
        (1, "b"): bytes([1, 2]),
    }
    for order in (
        [(0, "a"), (0, "b"), (1, "a"), (1, "b")],
        [(0, "a"), (1, "a"), (0, "b"), (1, "b")],
    ):
        sessions = [
            {
                "rank": rank,
                "step": 0,
                "stats": stage(run, slice(0, 2) if place == 0 else slice(2, 5), codes[place, dp]),
            }
            for rank, (place, dp) in enumerate(order)
        ]
        history = run.trace(sessions)
        assert (history.tokens[0], history.tokens_are_bounds) == ((5, 3), False)
        for file in run.base.parent.iterdir():
            file.unlink()


@pytest.mark.parametrize("lost", ["a rank", "tokens"])
def test_tokens_of_pipeline_stages_that_do_not_fit_are_a_lower_bound(
    run: Any, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Without the tokens of each stage their counts must not add up; the page says so."""
    if lost == "tokens":
        monkeypatch.setattr(trace, "MAX_TOKENS", 10)
    sessions = [
        {"rank": rank, "step": 0, "stats": stage(run, routers, bytes([2] * n + [1] * (64 - n)))}
        for rank, routers, n in ((0, slice(0, 2), 8), (1, slice(2, 5), 10), (2, slice(2, 5), 10))
    ]
    history = run.trace(sessions[: 3 if lost == "a rank" else 2])
    assert history.tokens[0] == ((128, 20) if lost == "a rank" else (64, 10))
    assert history.tokens_are_bounds
    if lost == "tokens":
        assert "lower bound" in run.page()


def test_steps_that_a_resumed_run_did_again_count_once(run: Any) -> None:
    """The latest process counts; several sessions of one process in a step add up."""
    twice = {"step": 1, "stats": run.stats(1, run.rollout(1)), "process": "second"}
    history = run.trace([*run.healthy(), twice, twice])
    assert history.by_step("rows_replayed")[:3] == [256, 512, 256]


def test_sessions_without_steps_are_counted_by_their_order(run: Any) -> None:
    """The axis is then called session."""
    history = run.trace([{"stats": run.stats(0)} for _ in range(3)])
    assert history.steps == [0, 1, 2]
    assert "3 replay sessions, sessions 0 to 2, one rank" in run.page()


def test_notes_of_ranks_are_averaged_by_their_tokens(run: Any) -> None:
    """The gap of two ranks equals that of all their tokens; a rank without tokens counts not."""
    torch.manual_seed(0)
    train, rollout_ = torch.randn(2, 100).double().unbind()
    parts = [slice(0, 10), slice(10, 100), slice(100, 100)]
    history = run.trace(
        [
            {
                "rank": rank,
                "step": 0,
                "stats": run.stats(0),
                "notes": policy_gap(train[part], rollout_[part]).as_dict(),
            }
            for rank, part in enumerate(parts)
        ]
    )
    noted = {name: series[0] for name, series in history.notes.items()}
    assert noted == pytest.approx(policy_gap(train, rollout_).as_dict(), rel=1e-12)


def test_prefixed_notes_are_series_of_their_own(run: Any) -> None:
    """live_mean_abs stands next to mean_abs in one panel; other notes do not."""
    notes = {"mean_abs": 0.1, "live_mean_abs": 0.4, "reward": 2.0, "live_tokens": 10.0}
    history = run.trace([{"step": 3, "stats": run.stats(3), "notes": notes}])
    assert history.gap_series("mean_abs") == {"": {3: 0.1}, "live": {3: 0.4}}


def test_expert_load_and_padding_are_summed_by_layer(run: Any) -> None:
    """Two sessions of the same load give twice the counts."""
    padding = torch.arange(NUM_TOKENS) >= 48
    one = expert_load(run.rollout(0), padding)
    history = run.trace([{**session, "expert_load": one} for session in run.healthy()[:2]])
    assert history.loads[NUM_EXPERTS][2].real == (2 * one.real[0]).tolist()
    assert history.loads[NUM_EXPERTS][2].padding == (2 * one.padding[0]).tolist()
    assert sum(history.loads[NUM_EXPERTS][5].padding) == 2 * 16 * TOPK


def test_phases_of_a_step_do_not_merge(run: Any) -> None:
    """A log-prob pass and an update of one step and rank, each with its own rows and tokens."""
    sessions = [
        {"step": 0, "stats": run.stats(0), "name": name} for name in ("logprobs", "train", "train")
    ]
    history = run.trace(sessions)
    assert list(history.phases) == ["logprobs", "train"]
    rows = [phase.by_step("rows_replayed") for phase in history.phases.values()]
    assert rows == [[256], [512]]
    assert [phase.tokens[0] for phase in history.phases.values()] == [(64, 8), (128, 16)]
    assert history.tokens[0] == (192, 24)


def test_processes_side_by_side_all_count(run: Any) -> None:
    """Ranks that did not know their rank share a file: none of them is a restart of another."""
    sessions = [
        {"step": step, "stats": run.stats(step), "process": process}
        for step in range(3)
        for process in ("first", "second")
    ]
    assert run.trace(sessions).by_step("rows_replayed") == [512, 512, 512]
