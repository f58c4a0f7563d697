"""What goes wrong in a replay on stock Megatron, seen through measure, trace and report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import BATCH, EXPERTS, FULL, LENGTH, batch, build, with_tokens

import r3patch
from r3patch import Routes, _config, cli
from r3patch.metrics import policy_gap
from r3patch.observe import trace as writer
from r3patch.observe.history import History, load
from r3patch.observe.verdict import Check, checks

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("cpu")]

STEPS = range(3)


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], History]:
    """Switches the trace on; called, it gives what the sessions so far have written."""
    base = str(tmp_path / "run.jsonl")
    monkeypatch.setattr(_config, "CONFIG", dataclasses.replace(_config.CONFIG, trace=base))
    monkeypatch.setattr(writer, "_lost", 0)
    return lambda: load([base])


def routes_of(model: torch.nn.Module, seed: int) -> Routes:
    with r3patch.record(model) as recording:
        model(**batch(seed))
    return with_tokens(recording.routes[0], seed)


def shifted(routes: Routes) -> Routes:
    """Each layer with the rows of the layer before it."""
    experts = routes.experts.roll(1, 1)
    return Routes(experts, routes.layers, num_experts=EXPERTS, tokens=routes.tokens)


def train(model: torch.nn.Module, step: int, routes: Routes) -> None:
    with r3patch.replay(model, [routes], measure=True, step=step) as session:
        loss = model(**batch(step))
        loss.mean().backward()
        session.note(**policy_gap(-loss, -loss).as_dict())


def answer(history: History, question: str) -> Check:
    return next(check for check in checks(history) if question in check.question)


def test_a_right_replay_has_only_good_answers(trace: Callable[[], History]) -> None:
    """The model's own routes: mismatch 0 everywhere, recompute equal, MTP left alone."""
    model = build(num_layers=4, **FULL)
    for step in STEPS:
        train(model, step, routes_of(model, step))
    history = trace()
    assert [check.good for check in checks(history)] == [True] * 8, checks(history)
    assert history.layers == [2, 3, 4]
    assert {history.mismatch(layer, step) for layer in (2, 3, 4) for step in STEPS} == {0.0}
    assert history.total("recompute_rows_differing") == 0 < history.total("recompute_calls")
    (mtp,) = history.mtp.values()
    assert (mtp["forward_calls"], mtp["rows_replayed"]) == (3, 0)
    assert history.by_layer("rows_replayed") == [len(STEPS) * BATCH * LENGTH] * 3
    assert history.notes["mean_abs"] == dict.fromkeys(STEPS, 0.0)
    assert any(sum(loads[2].real) for loads in history.loads.values() if 2 in loads)


@pytest.mark.foreign_routes
def test_a_replay_shifted_by_one_layer_shows_in_mismatch_by_layer_and_step(
    trace: Callable[[], History],
) -> None:
    """The heat map is dark in every layer, at every step."""
    model = build(num_layers=4)
    for step in STEPS:
        train(model, step, shifted(routes_of(model, step)))
    history = trace()
    check = answer(history, "routes those of")
    assert check.good is False
    assert check.shown_in == "Mismatch by layer and step"
    assert "At every measured step: columns shifted by a layer" in check.answer
    assert min(history.mismatch(layer, step) for layer in (2, 3, 4) for step in STEPS) > 0.9
    assert answer(history, "belong to the tokens").good, "tokens cannot tell layers"
    alarm = answer(history, "the alarm silent")
    assert (alarm.kind, alarm.answer[:21]) == ("attention", "It rang at steps 0-2:")


def test_a_replay_of_stale_rows_shows_in_mismatch_by_layer_and_step(
    trace: Callable[[], History],
) -> None:
    """The heat map has one dark column, at the step that replayed the rows of another batch."""
    model = build(num_layers=4)
    for step in STEPS:
        stale = pytest.raises(r3patch.ReplayError, match="an older batch")
        with stale if step == 2 else contextlib.nullcontext():
            train(model, step, routes_of(model, 0 if step == 2 else step))
    history = trace()
    told = answer(history, "belong to the tokens")
    assert (told.kind, told.answer[:29]) == ("bad", "Rows of other tokens at step ")
    check = answer(history, "routes those of")
    assert check.good is False
    assert check.shown_in == "Mismatch by layer and step"
    assert "step 2. At some steps only: stale rows" in check.answer
    dark = {step for step in STEPS for layer in (2, 3, 4) if history.mismatch(layer, step) > 0.5}
    assert dark == {2}


def test_a_session_on_orphaned_routers_shows_in_rows_by_source(
    trace: Callable[[], History],
) -> None:
    """A layer that was rebuilt inside the session leaves an orphan: refused, traced, and named."""
    model, rebuilt = build(num_layers=4), build(num_layers=4)
    routes = routes_of(model, 0)

    def rebuild_and_run() -> None:
        with r3patch.replay(model, [routes], measure=True, step=0):
            model.decoder.layers[2] = rebuilt.decoder.layers[2]
            model(**batch(0))

    with pytest.raises(r3patch.ReplayError, match="never reached Megatron's top-k"):
        rebuild_and_run()
    history = trace()
    check = answer(history, "every main router")
    assert check.good is False
    assert check.shown_in == "Rows by source"
    assert "decoder.layers.2.mlp.router (step 0)" in check.answer
    assert history.by_layer("rows_replayed") == [BATCH * LENGTH, 0, BATCH * LENGTH]
    assert answer(history, "without an error").good is False


def test_a_refusal_is_traced(trace: Callable[[], History]) -> None:
    """A session that was refused at its entry is in the trace, with its class and its text."""
    model = build(num_layers=4)
    routes = routes_of(model, 0)
    with pytest.raises(r3patch.RoutesError), r3patch.replay(model, [routes.select([2])], step=5):
        pass
    (session,) = trace().errors
    assert session.error is not None
    assert (session.step, session.error.type) == (5, "RoutesError")
    assert "has no column for" in session.error.text


def test_the_report_of_a_real_trace_is_written(
    trace: Callable[[], History], tmp_path: Path
) -> None:
    """End to end: sessions, trace, page."""
    pytest.importorskip("matplotlib")
    model = build(num_layers=4)
    train(model, 0, routes_of(model, 0))
    output = tmp_path / "report.html"
    assert cli.main(["report", str(tmp_path / "run.jsonl"), "-o", str(output)]) == 0
    text = output.read_text()
    assert "mtp.layers.0." in text
    assert "Mismatch by layer and step" in text


def test_doctor_builds_a_model_on_this_cpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routers of stock Megatron by path, scope, layer number and MoE ordinal."""
    import sys
    from types import ModuleType

    module = ModuleType("mine")
    module.build = lambda: build(num_layers=4)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", module)
    assert cli.main(["doctor", "--json", "--model", "mine:build"]) == 0
    routers = json.loads(capsys.readouterr().out)["routers"]
    rows = [(r["scope"], r["moe_ordinal"]) for r in routers]
    assert rows == [("main", 0), ("main", 1), ("main", 2), ("mtp", None)]
    assert [r["layer_number"] for r in routers[:3]] == [2, 3, 4]


def test_doctor_finds_the_settings_that_replay_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capacity factor is a warning, sinkhorn an error; each names router and setting."""
    import sys
    from types import ModuleType

    from r3patch.cli.doctor import examine

    model = build(num_layers=4)
    router = model.decoder.layers[1].mlp.router
    router.routing_type = "sinkhorn"
    model.config.moe_expert_capacity_factor = 1.5
    module = ModuleType("mine")
    module.build = lambda: model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", module)
    seen = examine("mine:build")
    levels = {(f.level, f.where.rpartition(": ")[0]) for f in seen.findings}
    assert not seen.ok
    assert ("error", "decoder.layers.1.mlp.router") in levels
    assert ("warning", "decoder.layers.2.mlp.router") in levels
