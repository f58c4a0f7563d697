"""The trace: whole lines whatever happens, bounded, a file per rank, and JSON for any reader."""

from __future__ import annotations

import base64
import dataclasses
import logging
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from traces import some_stats, strict, switch_on

from r3patch import R3PatchError, Routes, _config
from r3patch.metrics import expert_load, policy_gap
from r3patch.observe import trace

ROOT = Path(__file__).parents[2]
FORMAT = ROOT / "docs" / "observe.md"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of rank 0, with the trace switched on."""
    return switch_on(tmp_path, monkeypatch)


@pytest.fixture
def child(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Starts a Python that runs a snippet with R3PATCH_TRACE set."""

    def start(code: str) -> subprocess.Popen[str]:
        env = {**os.environ, "R3PATCH_TRACE": str(tmp_path / "run.jsonl")}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

    return start


def test_nothing_is_written_without_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is off."""
    monkeypatch.setattr(_config, "CONFIG", dataclasses.replace(_config.CONFIG, trace=None))
    monkeypatch.chdir(tmp_path)
    assert not trace.enabled()
    trace.write(trace.session("replay"))
    assert list(tmp_path.iterdir()) == []


def test_a_record_holds_what_the_session_did(path: Path) -> None:
    """Numbers of the stats, the notes, and the error, after a round trip through the file."""
    gap = policy_gap(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0]))
    load = expert_load(Routes([[[0, 2]], [[1, 2]]], (2,), num_experts=3))
    error = ValueError("x" * 10_000)
    notes = gap.as_dict()
    trace.write(
        trace.session(
            "replay", step=7, stats=some_stats(), notes=notes, expert_load=load, error=error
        )
    )

    (record,), broken = trace.read(path)

    assert broken == 0
    assert (record["schema"], record["rank"], record["kind"], record["step"]) == (1, 0, "replay", 7)
    main, mtp = record["routers"]
    assert (main["scope"], main["layer_number"], main["rows_replayed"]) == ("main", 2, 90)
    assert (main["mismatch"], main["overlap"]) == (0.1, 351 / 360)
    assert (mtp["scope"], mtp["rows_live"], mtp["mismatch"]) == ("mtp", 96, None)
    assert (record["tokens_measured"], record["tokens_differing"]) == (3, 1)
    assert record["token_checks"] == [{"chunk": 0, "checked": 30, "why_not": "", "wrong": 2}]
    assert record["agreement"] == {"kappa": 0.75, "chance": 0.25, "rows": 64, "alarmed": False}
    assert record["seconds"] == {"copy": 0.25}
    assert record["notes"]["mean_abs"] == 0.25
    assert record["expert_load"]["real"] == [[1, 1, 2]]
    assert record["error"]["type"] == "ValueError"
    assert len(record["error"]["text"]) == trace.MAX_ERROR_CHARACTERS
    assert record["versions"]["torch"] == torch.__version__


def test_every_field_is_in_the_documented_table(path: Path) -> None:
    """docs/observe.md names the fields of a record and of a router, no more and no fewer.

    Those of a token check and of the agreement stand in the line of their field.
    """
    trace.write(trace.session("replay", stats=some_stats()))
    (record,), _ = trace.read(path)
    tables = re.findall(r"(?:^\|.*\n)+", FORMAT.read_text(), re.MULTILINE)
    documented = [re.findall(r"^\| `(\w+)`", table, re.MULTILINE) for table in tables]
    assert [*record, "dropped", "lost"] in documented
    assert sorted(record["routers"][0]) in [sorted(names) for names in documented]
    for field, held in (
        ("token_checks", record["token_checks"][0]),
        ("agreement", record["agreement"]),
    ):
        (line,) = re.findall(rf"^\| `{field}` \|.*", FORMAT.read_text(), re.MULTILINE)
        assert set(held) <= set(re.findall(r"`(\w+)`", line))


def test_a_record_is_one_write_of_a_whole_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One system call per record, so that a crash leaves the whole of it or nothing."""
    written: list[bytes] = []

    def write(file: int, data: bytes) -> int:
        written.append(data)
        return len(data)

    monkeypatch.setattr(os, "write", write)
    trace.write(trace.session("replay", stats=some_stats()))
    assert len(written) == 1
    assert written[0].endswith(b"\n")
    assert written[0].count(b"\n") == 1


def test_nan_and_infinity_are_text_that_any_json_reader_takes(path: Path) -> None:
    """NaN is no JSON, and null would hide that a run blew up."""
    notes = {"mean_abs": math.nan, "k1": math.inf, "k3": -math.inf}
    trace.write(trace.session("replay", notes=notes))
    record = strict(path.read_text())
    assert record["notes"] == {"mean_abs": "nan", "k1": "inf", "k3": "-inf"}
    assert math.isnan(float(record["notes"]["mean_abs"]))


def test_integers_that_no_double_holds_are_written_as_doubles(path: Path) -> None:
    """Readers of other languages have nothing else, and ours takes no count beyond them."""
    trace.write(trace.session("replay", notes={"small": 2**53 - 1, "large": 2**60}))
    notes = strict(path.read_text())["notes"]
    assert notes == {"small": 2**53 - 1, "large": 2.0**60}
    assert [type(value) for value in notes.values()] == [int, float]


def test_tokens_that_were_cut_short_are_none() -> None:
    """Also where only the checksum behind them is missing."""
    text = trace.pack_tokens(b"\1\2\0")
    assert text is not None
    cut = base64.b64encode(base64.b64decode(text)[:-4]).decode()
    assert trace.unpack_tokens(text) == b"\1\2\0"
    with pytest.raises(ValueError, match="cut short"):
        trace.unpack_tokens(cut)


def test_each_rank_writes_its_own_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """run.jsonl becomes run.rank0.jsonl, run.rank1.jsonl, ..."""
    for rank in (0, 1, 11):
        monkeypatch.setattr(trace, "_rank", lambda rank=rank: rank)
        trace.write(trace.session("record"))
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == ["run.rank0.jsonl", "run.rank1.jsonl", "run.rank11.jsonl"]
    assert trace.read(path.with_name("run.rank11.jsonl"))[0][0]["rank"] == 11


def test_a_record_after_a_cut_line_is_whole(path: Path) -> None:
    """What a full disk cut short spoils itself and nothing that follows."""
    trace.write(trace.session("replay", step=1))
    with path.open("ab") as file:
        file.write(b'{"schema":1,"time":')
    trace.write(trace.session("replay", step=2))
    records, broken = trace.read(path)
    assert [record["step"] for record in records] == [1, 2]
    assert broken == 1


def test_lines_are_whole_after_a_kill(
    child: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    """A process killed in the middle of its writing leaves whole lines."""
    process = child(
        """
        from r3patch.observe import trace
        record = trace.session("replay", notes={f"note_{i}": i / 7 for i in range(5000)})
        for step in range(10**9):
            trace.write({**record, "step": step})
            if step == 3: print("going", flush=True)
        """
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "going\n"
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    data = (tmp_path / "run.rank0.jsonl").read_bytes()
    assert data.endswith(b"\n")
    steps = [strict(line)["step"] for line in data.splitlines()]
    assert steps == list(range(len(steps)))
    assert len(steps) >= 4


def test_processes_that_share_a_file_do_not_mix_lines(
    child: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Ranks that do not know their rank yet append to one file; each line stays whole."""
    code = """
        from r3patch.observe import trace
        record = trace.session("replay", notes={f"note_{i}": i / 7 for i in range(2000)})
        for step in range(40): trace.write({**record, "step": step})
        """
    for process in [child(code) for _ in range(3)]:
        assert process.wait(60) == 0
    records, broken = trace.read(tmp_path / "run.rank0.jsonl")
    assert (len(records), broken) == (120, 0)
    assert len({record["process"] for record in records}) == 3


def test_a_full_file_ends_with_a_line_that_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The bound is kept but for that last line, and the log tells once."""
    monkeypatch.setattr(trace, "MAX_FILE_BYTES", 2000)
    for step in range(50):
        trace.write(trace.session("replay", step=step))
    records, _ = trace.read(path)
    assert [record["kind"] for record in records[-2:]] == ["replay", "truncated"]
    assert records[-1]["max_bytes"] == 2000
    assert path.stat().st_size < 2300
    assert [r.levelno for r in caplog.records if r.name == "r3patch.observe.trace"] == [
        logging.WARNING
    ]


def test_a_long_line_loses_its_largest_parts_by_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line never exceeds its bound, and what is missing is named in it."""
    load = expert_load(Routes([[[0, 999]]], (1,), num_experts=1000))
    monkeypatch.setattr(trace, "MAX_LINE_BYTES", 3000)
    trace.write(trace.session("replay", stats=some_stats(), expert_load=load))
    notes = {f"note_{i}": float(i) for i in range(500)}
    trace.write(trace.session("replay", stats=some_stats(), notes=notes))
    first, second = trace.read(path)[0]
    assert first["expert_load"] is None
    assert first["dropped"] == ["expert_load"]
    assert len(first["routers"]) == 2
    assert second["dropped"] == ["expert_load", "routers", "notes"]
    assert all(len(line) < 3000 for line in path.read_bytes().splitlines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema":2}\n', "line of schema 2, this r3patch reads 1"),
        ('{"loss":1.0}\n', "line of schema None"),
        ("[1]\n", "line of schema None"),
        ("hello\n", r"holds no trace record \(1 unreadable lines\)"),
        ("", "holds no trace record"),
    ],
)
def test_read_refuses_what_is_no_trace(tmp_path: Path, text: str, message: str) -> None:
    """A wrong file is an error and not an empty report."""
    file = tmp_path / "some.jsonl"
    file.write_text(text)
    with pytest.raises(R3PatchError, match=message):
        trace.read(file)
