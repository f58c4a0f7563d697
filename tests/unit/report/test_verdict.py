"""What goes wrong in a run is told, session by session, in words and by the figure to look at."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from r3patch import R3PatchError, ReplayError
from r3patch.observe.history import History, load
from r3patch.observe.stats import ReplayStats, RouterStats
from r3patch.observe.verdict import Check, checks, verdict

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


def test_hash_routed_layers_owe_no_replay(run: Any) -> None:
    """Their experts follow from token ids: all rows live there, and the run is good."""
    first, *others = run.stats(0).routers
    counts = {"rows_replayed": 0, "rows_measured": 0, "rows_differing": 0, "experts_shared": 0}
    hashed = dataclasses.replace(first, hash_routed=True, rows_live=72, **counts)
    assert bad(run.trace([{"step": 0, "stats": ReplayStats((hashed, *others))}])) == set()


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


def test_faults_of_the_trace_itself_are_told(run: Any, tmp_path: Path) -> None:
    """A cut line, and a rank whose file is missing."""
    run.trace([{**session, "rank": 1} for session in run.healthy()])
    with (tmp_path / "run.rank1.jsonl").open("a") as file:
        file.write('{"schema": 1, "ti')
    check = answers(load([str(tmp_path / "run.jsonl")]))[WHOLE]
    assert check.good is False
    assert check.answer == "1 unreadable lines; only ranks 1 are here"


@pytest.mark.parametrize("kind", ["session", "rank", "phase"])
def test_a_bad_session_is_not_averaged_away(
    run: Any, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Among 30 healthy ones of its step: not good, named, first line, exit status 1."""
    wrong = {"step": 3, "stats": run.stats(3, run.rollout(7)), "name": "train"}
    healthy = [{**session, "name": "train"} for session in run.healthy()]
    sessions = {
        "session": [*healthy * 5, wrong],
        "rank": [{**s, "rank": rank} for rank in range(5) for s in healthy],
        "phase": [{**s, "name": name} for name in "abcde" for s in run.healthy()] + healthy,
    }[kind]
    if kind == "rank":
        sessions = [
            wrong | {"rank": 3} if (s["rank"], s["step"]) == (3, 3) else s for s in sessions
        ]
    if kind == "phase":
        sessions = [wrong if (s["name"], s["step"]) == ("train", 3) else s for s in sessions]
    history = run.trace(sessions)
    rank = 3 if kind == "rank" else 0
    assert bad(history) == {RELATED}
    answer = answers(history)[RELATED].answer
    assert f"Worst: rank {rank}, step 3, train, " in answer
    assert "layers 2-5, step 3" in answer
    assert history.worst[2, 3] > 0.9 > history.mismatch(2, 3)
    if kind == "rank":
        assert "on rank 3 only" in answer
    first = verdict(checks(history))
    assert not first.good
    assert str(first).startswith(f"Not good. {RELATED} Hardly, in layers 2-5, step 3")


@pytest.mark.parametrize("good", [True, False])
def test_the_first_line_and_the_exit_status_are_the_verdict(
    run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, good: bool
) -> None:
    """Scripts stop at it, readers at the first line; nothing is wider than 60 columns."""
    monkeypatch.setenv("COLUMNS", "60")
    rows = run.rollout(0, shift=0 if good else 1)
    run.trace([{"step": 0, "stats": run.stats(0, rows)}])
    text = run.page(status=0 if good else 1)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("Good." if good else "Not good. Are the routes those of these tokens")
    assert max(map(len, lines[:-2])) <= 60
    assert f'class="verdict {"good" if good else "bad"}"' in text
    assert ("<tr class=bad>" in text) is not good


def test_what_nobody_looked_at_is_not_called_good_without_saying_so(run: Any) -> None:
    """Not measured: the verdict names what is unknown."""
    found = verdict(checks(run.trace([{"kind": "record", "step": 0, "stats": run.stats(0)}])))
    assert str(found).startswith("Good, as far as was looked. Unknown: Did every main router")


def test_what_the_run_does_not_have_is_not_unknown(run: Any) -> None:
    """No recompute and no MTP: there was nothing to look at, so the run is good."""
    (router, *_), none = run.stats(0).routers, {"recompute_calls": 0, "recompute_rows_measured": 0}
    history = run.trace([{"step": 0, "stats": ReplayStats((dataclasses.replace(router, **none),))}])
    assert verdict(checks(history)).word == "Good."


@pytest.mark.parametrize(("rows", "good"), [(1, None), (15, None), (16, False)])
def test_a_handful_of_rows_is_no_verdict(run: Any, rows: int, good: bool | None) -> None:
    """One row of top-1 shares all or nothing; fewer than 16 rows are pooled over layers."""
    router = RouterStats("r", 0, "main", 2, forward_calls=1, rows_replayed=rows, topk=1)
    router = dataclasses.replace(router, rows_measured=rows, rows_differing=rows)
    history = run.trace([{"step": 0, "stats": ReplayStats((router,))}])
    assert answers(history)[RELATED].good is good


def test_records_that_were_lost_are_told(run: Any) -> None:
    """What could not be written was judged by nobody."""
    folder = run.base.with_name("run.rank0.jsonl")
    folder.mkdir()
    for session in run.healthy()[:2]:
        with pytest.raises(R3PatchError):
            run.trace([session])
    folder.rmdir()
    check = answers(run.trace(run.healthy()[2:]))[WHOLE]
    assert (check.good, check.answer) == (False, "2 records could not be written")
