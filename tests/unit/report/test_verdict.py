"""What goes wrong in a run is told, session by session, in words and by the figure to look at."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from r3patch import ReplayError
from r3patch.metrics import expert_load, policy_gap, route_mismatch
from r3patch.observe import trace
from r3patch.observe.history import History, load
from r3patch.observe.stats import ReplayStats, RouterStats
from r3patch.observe.verdict import Check, checks

LAYERS, NUM_TOKENS, NUM_EXPERTS, TOPK = (2, 3, 4, 5), 64, 16, 4
STEPS = range(6)

REACHED = "Did every main router replay?"
RELATED = "Are the routes those of these tokens, layers and weights?"
MTP_ALONE = "Were MTP routers left alone?"
RECOMPUTED = "Did recompute route as its forward did?"
NO_ERROR = "Did every session end without an error?"
WHOLE = "Is the trace whole?"


def answers(history: History) -> dict[str, Check]:
    return {check.question: check for check in checks(history)}


def bad(history: History) -> set[str]:
    return {check.question for check in checks(history) if check.good is False}


def test_a_healthy_run_has_no_bad_answer(run: Any) -> None:
    """An eighth of the rows differ by one expert of four, in every layer and step."""
    history = run.trace(run.healthy())
    assert bad(history) == set()
    assert [[history.mismatch(layer, step) for step in STEPS] for layer in LAYERS] == [
        [0.125] * len(STEPS)
    ] * len(LAYERS)
    assert history.overlap(2, 0) == 1 - 0.125 / TOPK
    assert history.by_step("rows_replayed") == [NUM_TOKENS * len(LAYERS)] * len(STEPS)
    assert history.tokens[0] == (64, 8)
    assert answers(history)[RELATED].answer == "They share 96.9% of the live experts."


def test_a_replay_shifted_by_one_layer_shows_in_mismatch_by_layer_and_step(run: Any) -> None:
    """Every layer is dark at every step, and the answer says which kind of fault that is."""
    history = run.trace(
        [{"step": step, "stats": run.stats(step, run.rollout(step, shift=1))} for step in STEPS]
    )
    check = answers(history)[RELATED]
    assert check.good is False
    assert check.shown_in == "Mismatch by layer and step"
    assert "layers 2-5, steps 0-5. At every measured step: columns shifted" in check.answer
    assert min(history.mismatch(layer, step) for layer in LAYERS for step in STEPS) > 0.9
    assert bad(history) == {RELATED}


def test_a_replay_of_stale_rows_shows_in_mismatch_by_layer_and_step(run: Any) -> None:
    """Two steps that replayed the rows of the step before are dark columns between pale ones."""
    stale = (3, 4)
    history = run.trace(
        [
            {
                "step": step,
                "stats": run.stats(step, run.rollout(step - 1 if step in stale else step)),
            }
            for step in STEPS
        ]
    )
    check = answers(history)[RELATED]
    assert check.good is False
    assert check.shown_in == "Mismatch by layer and step"
    assert "steps 3-4. At some steps only: stale rows" in check.answer
    dark = {step for step in STEPS for layer in LAYERS if history.mismatch(layer, step) > 0.5}
    assert dark == set(stale)


def test_an_orphaned_router_shows_in_rows_by_source(run: Any) -> None:
    """A router that nothing called has no bar among its neighbours, and the answer names it."""
    history = run.trace(
        [{"step": step, "stats": run.stats(step, run.rollout(step), without=4)} for step in STEPS]
    )
    check = answers(history)[REACHED]
    assert check.good is False
    assert check.shown_in == "Rows by source"
    assert "never called by decoder.layers.3.mlp.router (steps 0-5)" in check.answer
    rows = NUM_TOKENS * len(STEPS)
    assert history.by_layer("rows_replayed") == [rows, rows, 0, rows]


def test_an_orphan_shows_although_its_session_ended_with_an_error(run: Any) -> None:
    """Leaving such a session raises; the refusal is listed and the router is named."""
    error = ReplayError("decoder.layers.3.mlp.router (layer 4) replayed 0 microbatches")
    history = run.trace([{"step": 0, "stats": run.stats(0, without=4), "error": error}])
    assert bad(history) == {REACHED, NO_ERROR}
    assert history.errors[0].error.type == "ReplayError"


def test_a_refused_session_blames_no_router(run: Any) -> None:
    """A session that was refused at its entry called none, which is no orphan."""
    idle = ReplayStats((RouterStats("decoder.layers.1.mlp.router", 0, "main", 2),))
    refused = {"step": 6, "stats": idle, "error": ReplayError("refused")}
    assert bad(run.trace([*run.healthy(), refused])) == {NO_ERROR}


def test_a_step_without_any_route_is_no_good_answer(run: Any) -> None:
    """All rows live: the session ran, and replayed nothing."""
    empty = run.stats(2)
    routers = tuple(
        dataclasses.replace(
            router,
            rows_replayed=0,
            rows_live=72,
            rows_measured=0,
            rows_differing=0,
            experts_shared=0,
        )
        for router in empty.routers
    )
    history = run.trace([*run.healthy(), {"step": 6, "stats": ReplayStats(routers)}])
    assert "No row of layers 2-5 had routes at step 6." in answers(history)[REACHED].answer


def test_replay_that_reaches_mtp_is_a_bad_answer(run: Any) -> None:
    """One replayed row of an MTP router is enough; else the calls left alone are counted."""
    assert (
        answers(run.trace(run.healthy()))[MTP_ALONE].answer == "12 calls took Megatron's own top-k."
    )
    touched = {"step": 9, "stats": run.stats(9, rows_replayed=1)}
    check = answers(run.trace([touched]))[MTP_ALONE]
    assert check.good is False
    assert "mtp.layers.0.mlp.router" in check.answer


def test_recompute_that_routes_otherwise_is_a_bad_answer(run: Any) -> None:
    """2 % of the rows is a wrong match; a near-tie in a thousand rows is not."""

    def answer(step: int, differing: int, measured: int) -> bool | None:
        routers = tuple(
            dataclasses.replace(
                router,
                recompute_rows_measured=measured,
                recompute_rows_differing=differing,
            )
            for router in run.stats(0).routers
        )
        history = run.trace([{"step": step, "stats": ReplayStats(routers)}])
        run.base.with_name("run.rank0.jsonl").unlink()
        return answers(history)[RECOMPUTED].good

    assert answer(0, 20, 1000) is False
    assert answer(1, 1, 1000) is True
    assert answer(2, 0, 0) is None


def test_without_measure_the_routes_are_unknown_and_not_good(run: Any) -> None:
    """No measure, no verdict; the page says how to get one and still draws the rows."""
    routers = tuple(
        dataclasses.replace(
            router, rows_measured=0, rows_differing=0, experts_shared=0, recompute_rows_measured=0
        )
        for router in run.stats(0).routers
    )
    history = run.trace([{"step": 0, "stats": ReplayStats(routers)}])
    assert answers(history)[RELATED].good is None
    text = run.page()
    assert "open sessions with measure=True" in text
    assert "Rows by source" in text
    assert "Mismatch over steps" not in text


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


def test_faults_of_the_trace_itself_are_told(run: Any, tmp_path: Path) -> None:
    """A cut line, and a rank whose file is missing."""
    run.trace([{**session, "rank": 1} for session in run.healthy()])
    with (tmp_path / "run.rank1.jsonl").open("a") as file:
        file.write('{"schema": 1, "ti')
    check = answers(load([str(tmp_path / "run.jsonl")]))[WHOLE]
    assert check.good is False
    assert check.answer == "1 unreadable lines; only ranks 1 are here"
