"""Whatever a trace holds, it is read or counted, and the page is made."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch

from r3patch import R3PatchError, Routes, cli
from r3patch.metrics import expert_load, policy_gap
from r3patch.observe import reader
from r3patch.observe.history import load
from r3patch.observe.stats import Agreement, TokenCheck
from r3patch.observe.verdict import checks, verdict

MISSING = object()
#: What a field becomes, one after another. A JSON reader takes NaN, and so do other writers.
VALUES: tuple[Any, ...] = (
    MISSING, None, True, 0, -1, 1, 2**53, 10**400, 0.5, -1e308, 1e308, float("nan"), float("-inf"),
    "", "nan", "text", "$\\frac{", "\ud800", "\x00\x1b[31m", "x" * 50_000, [], [[]], [None], {},
    {"x": 1}, {"layers": [1]},
)  # fmt: skip


def whole_records(run: Any) -> list[dict[str, Any]]:
    """A replay and a recording with every field that there is."""
    gap = policy_gap(torch.tensor([-1.0]), torch.tensor([-1.25])).as_dict()
    rows = run.rollout(0)
    told = {"token_checks": (TokenCheck(0, 40, "", 30),), "first_rows": Agreement(64, 256, 99, 40)}
    stats = dataclasses.replace(run.stats(0), alarmed=True, **told)
    both = {"stats": stats, "notes": gap, "expert_load": expert_load(rows), "name": "train"}
    run.trace([{"step": 3, **both, "error": ValueError("no")}, {"kind": "record", **both}])
    file = run.base.with_name("run.rank0.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    file.unlink()
    for record in records:
        record["routers"] = record["routers"][:1] + record["routers"][-1:]
        record |= {"dropped": ["notes.x"], "lost": 1}
    return records


def places(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """The path of everything inside; of a list's numbers the first is enough."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, *path, key)
    elif isinstance(value, list):
        for index, item in enumerate(value[: 1 if path[-1:] != ("routers",) else 2]):
            yield from places(item, *path, index)


def changed(record: dict[str, Any], path: tuple[Any, ...], value: Any) -> str:
    record = copy.deepcopy(record)
    *way, last = path
    inner: Any = record
    for key in way:
        inner = inner[key]
    if value is MISSING:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(record)


def mutants(run: Any, *but: str) -> list[str]:
    return [
        changed(record, path, value)
        for record in whole_records(run)
        for path in places(record)
        if path[-1] not in but
        for value in VALUES
    ]


def refused_with(record: dict[str, Any]) -> str | None:
    try:
        reader.parse(record)
    except ValueError as error:
        return str(error)
    return None


def test_a_mutated_line_is_read_or_counted(run: Any) -> None:
    """Each field missing, null, of another type, huge, negative, nan: never another exception."""
    lines = mutants(run)
    assert len(lines) > 2000
    read = refused = 0
    for line in lines:
        refusal = refused_with(json.loads(line))
        if refusal is None:
            read += 1
        else:
            refused += 1
            assert 0 < len(refusal) < 300
    assert refused > read > 100


@pytest.mark.slow
def test_the_page_of_all_mutants_is_made(run: Any) -> None:
    """Those that can be read are drawn, the others are counted and shown by their reasons."""
    lines = mutants(run, "name")  # each of which would be a phase with figures of its own
    file = run.base.with_name("run.rank0.jsonl")
    file.write_text("\n".join(lines) + "\n")
    history = load([str(run.base)])
    counted = sum(history.unreadable.values())
    assert counted > len(lines) / 2
    # What a resumed run did again is read as well, and counts once.
    assert len(lines) - counted >= len(history.sessions) > 10
    text = run.page(status=1)
    assert "Unreadable" in text
    assert "rows_replayed is None" in text
    assert f"{counted:,} unreadable lines".replace(",", "") in text.replace(",", "")


@pytest.mark.parametrize("field", ["step", "rank", "time", "name"])
def test_each_mutant_has_a_verdict(run: Any, field: str) -> None:
    """One line at a time beside a healthy one: what orders sessions is not what breaks them."""
    healthy, recording = whole_records(run)
    file = run.base.with_name("run.rank0.jsonl")
    for value in VALUES:
        line = changed(healthy, (field,), value)
        file.write_text("\n".join([json.dumps(healthy), line, json.dumps(recording)]))
        history = load([str(run.base)])
        assert str(verdict(checks(history))).startswith("Not good")  # of the error in it
        assert len(history.sessions) + sum(history.unreadable.values()) in (2, 3)


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40,
        b"[" * 100_000,
        b'{"schema":1' + b',"a":[' * 50_000,
        b'{"schema":1,"kind":"replay"}\n' * 3,
        b'{"schema":true,"kind":"replay"}\n',
        b'{"schema":1,"kind":"truncated"}\n',
        b'{"loss": 1.0}\n{"loss": 0.5}\n',
        b"\xff\xfe{\x00}\x00",
        b"\n" * 5000,
        b"",
    ],
)
def test_a_foreign_file_is_one_line_of_words(
    run: Any, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    """Alone it is an error without a traceback; beside a trace it is counted and shown."""
    other = run.base.with_name("other.jsonl")
    other.write_bytes(content)
    assert cli.main(["report", str(other)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("r3patch report: ")
    assert error.count("\n") == 1
    run.trace(run.healthy()[:1])
    history = load([str(run.base), str(other)])
    assert len(history.sessions) == 1
    assert verdict(checks(history)).good is False
    assert history.truncated or any("other.jsonl" in text for text in history.unreadable)


def test_files_beside_the_trace_are_not_taken_for_it(run: Any) -> None:
    """Only run.rank<number>.jsonl belongs to run.jsonl."""
    run.trace(run.healthy()[:1])
    for name in ("run.rankX.jsonl", "run.rank.jsonl", "run.rank0.jsonl.gz", "rerun.rank1.jsonl"):
        run.base.with_name(name).write_text("foreign")
    history = load([str(run.base)])
    assert [Path(file).name for file in history.files] == ["run.rank0.jsonl"]
    assert not history.unreadable


def test_record_sessions_alone_make_a_page(run: Any) -> None:
    """Nothing was replayed, so nothing is bad, and it says so."""
    load_ = expert_load(run.rollout(0))
    history = run.trace(
        [{"kind": "record", "step": 0, "stats": run.stats(0), "expert_load": load_}]
    )
    assert checks(history)[0].answer == "There is no replay session here."
    text = run.page()
    assert "0 replay sessions" in text
    assert "Expert load" in text


def test_sessions_that_were_refused_before_they_began_make_a_page(run: Any) -> None:
    """No router, an error: not good, and the error is what the page shows."""
    run.trace([{"step": 0, "error": R3PatchError("the model has no MoE router")}])
    text = run.page(status=1)
    assert "R3PatchError: the model has no MoE router" in text


def test_models_of_different_sizes_have_loads_of_their_own(run: Any) -> None:
    """Two models in one process: 16 and 8 experts, in the same layers, and two figures."""
    narrow = Routes(
        torch.arange(4).expand(64, 4, 4).contiguous(), run.rollout(0).layers, num_experts=8
    )
    history = run.trace(
        [
            {"step": 0, "stats": run.stats(0), "expert_load": expert_load(run.rollout(0))},
            {"step": 0, "stats": run.stats(0), "expert_load": expert_load(narrow)},
        ]
    )
    assert {number: len(loads) for number, loads in history.loads.items()} == {16: 4, 8: 4}
    text = run.page()
    assert "Expert load, 8 experts" in text
    assert "Expert load, 16 experts" in text


def test_names_of_notes_and_phases_are_text_in_the_figures(run: Any) -> None:
    """Not formulas, not markup, and nothing that an SVG may not hold."""
    figures = pytest.importorskip("r3patch.cli._figures").figures
    names = ["$\\frac{1", "a$b$c", "\\", "_", "\x00\x01", "\ud800\n", "x" * 300]
    notes: dict[str, float] = {f"{name}_mean_abs": 0.1 for name in names}
    sessions = [{"step": 0, "stats": run.stats(0), "name": n, "notes": notes} for n in names[:2]]
    for figure in figures(run.trace(sessions)):
        ET.fromstring(figure.svg)
