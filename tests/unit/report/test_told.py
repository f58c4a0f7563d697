"""Rows of other tokens and alarms in a trace: told by session and rank, in the first line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from r3patch.observe.history import History, load
from r3patch.observe.stats import Agreement, ReplayStats, TokenCheck
from r3patch.observe.verdict import Check, checks, verdict

TOKENS = "Do the rows belong to the tokens that the model got?"
ALARM = "Was the alarm silent?"

RIGHT = TokenCheck(0, 40, "")
WRONG = TokenCheck(0, 40, "", 30)
NONE = TokenCheck(0, 0, "no tokens: pass tokens= to decode")
AGREES = Agreement(64, 256, 250, 64)
FOREIGN = Agreement(64, 256, 64, 64)


def told(run: Any, step: int, check: TokenCheck, rows: Agreement = AGREES) -> ReplayStats:
    plain: ReplayStats = run.stats(step)
    return dataclasses.replace(
        plain, token_checks=(check,), first_rows=rows, alarmed=rows is FOREIGN
    )


def trace(run: Any, odd: dict[str, Any] | None = None) -> History:
    """Four ranks of three healthy steps; rank 2 does the second of them as `odd` says."""
    sessions = [
        {"rank": rank, "step": step, "name": "train", "stats": told(run, step, RIGHT)}
        for rank in range(4)
        for step in range(3)
    ]
    if odd is not None:
        sessions = [s | odd if (s["rank"], s["step"]) == (2, 1) else s for s in sessions]
    found: History = run.trace(sessions)
    return found


def answer(history: History, question: str) -> Check:
    return next(check for check in checks(history) if check.question == question)


def test_a_healthy_run_says_what_was_compared(run: Any) -> None:
    """Both questions have a good answer, with numbers."""
    history = trace(run)
    assert verdict(checks(history)).word == "Good."
    assert answer(history, TOKENS).answer == "All 480 that were compared, in 12 of 12 sessions."
    assert "by 0.97 or more, of 1" in answer(history, ALARM).answer


@pytest.mark.parametrize("alarm", [AGREES, FOREIGN], ids=["silent", "rang"])
def test_rows_of_other_tokens_are_bad(
    run: Any, alarm: Agreement, capsys: pytest.CaptureFixture[str]
) -> None:
    """One session of one rank among twelve: first line, named, exit status 1, marked in the page.

    The alarm adds to it, and does not take its place.
    """
    history = trace(run, {"stats": told(run, 1, WRONG, alarm)})
    found = verdict(checks(history))
    assert (found.kind, found.good) == ("bad", False)
    assert str(found).startswith(f"Not good. {TOKENS} Rows of other tokens at step 1, rank 2,")
    assert "Worst: rank 2, step 1, train, 30 of 40 tokens." in str(found)
    page = run.page(status=1)
    assert capsys.readouterr().out.startswith("Not good. Do the rows belong")
    assert "<tr class=bad><td>rank 2, step 1, train</td><td>40</td><td>30</td>" in page
    assert page.count("<tr class=bad>") == 1


def test_an_alarm_alone_is_attention(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Routes may be foreign on purpose: it is no fault, and not good either."""
    history = trace(run, {"stats": told(run, 1, RIGHT, FOREIGN)})
    found = verdict(checks(history))
    assert (found.kind, found.good) == ("attention", False)
    assert str(found).startswith(f"Attention. {ALARM} It rang at step 1, rank 2, train")
    assert "Worst: rank 2, step 1, train, 0.00 of 1." in str(found)
    page = run.page(status=1)
    assert capsys.readouterr().out.startswith("Attention. ")
    assert 'class="verdict attention"' in page
    assert '<li class="attention">' in page
    assert "<tr class=bad><td>rank 2, step 1, train</td><td>40</td><td>0</td>" in page


def test_another_fault_goes_before_an_alarm(run: Any) -> None:
    """What is surely wrong comes first, whatever the order of the questions."""
    odd = {"stats": told(run, 1, RIGHT, FOREIGN), "error": ValueError("no")}
    found = verdict(checks(trace(run, odd)))
    assert found.kind == "bad"
    assert "Did every session end without an error?" in found.reason
    assert "And 1 more fault, below." in found.reason


def test_what_was_not_compared_has_a_reason(run: Any) -> None:
    """Sessions without tokens are not called right; the answer says what to do."""
    history = run.trace([{"step": 0, "stats": told(run, 0, NONE, Agreement())}])
    check = answer(history, TOKENS)
    assert (check.good, check.answer) == (
        None,
        "None was compared: no tokens: pass tokens= to decode.",
    )
    assert answer(history, ALARM).good is None
    assert verdict(checks(history)).good


def test_too_few_rows_for_the_alarm_are_no_figure(run: Any) -> None:
    """The trace has the rows and no kappa; the page says why."""
    history = run.trace([{"step": 0, "stats": told(run, 0, RIGHT, Agreement(63, 252, 63, 63))}])
    (session,) = history.sessions
    assert (session.agreement.kappa, session.agreement.rows) == (None, 63)
    assert answer(history, ALARM).good is None
    assert "too few rows" in run.page()


def test_a_trace_of_an_older_release_is_read(run: Any, tmp_path: Path) -> None:
    """Without the fields: nothing was compared, and the rest is judged as before."""
    trace(run)
    for file in tmp_path.glob("run.rank*.jsonl"):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        for record in records:
            del record["token_checks"], record["agreement"]
        file.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    history = load([str(tmp_path / "run.jsonl")])
    assert not history.unreadable
    assert verdict(checks(history)).word == "Good."
    assert answer(history, TOKENS).answer == "None was compared."
    assert "Tokens and the alarm</h2>" not in run.page()
