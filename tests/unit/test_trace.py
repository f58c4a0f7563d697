"""The trace: whole lines whatever happens, bounded, a file per rank, and JSON for any reader."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from r3patch import ConfigError, R3PatchError, Routes, _config
from r3patch.metrics import expert_load, policy_gap
from r3patch.observe import trace
from r3patch.observe.stats import ReplayStats, RouterStats

ROOT = Path(__file__).parents[2]
FORMAT = ROOT / "docs" / "observe.md"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of rank 0, with the trace switched on."""
    base = tmp_path / "runs" / "run.jsonl"
    config = dataclasses.replace(_config.CONFIG, trace=str(base))
    monkeypatch.setattr(_config, "CONFIG", config)
    monkeypatch.setattr(trace, "_lost", 0)
    monkeypatch.setattr(trace, "_full", False)
    return base.with_name("run.rank0.jsonl")


@pytest.fixture
def child(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Starts a Python that runs a snippet with R3PATCH_TRACE set."""

    def start(code: str) -> subprocess.Popen[str]:
        env = {**os.environ, "R3PATCH_TRACE": str(tmp_path / "run.jsonl")}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

    return start


def strict(line: str | bytes) -> Any:
    """json.loads as other languages have it: without NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(line, parse_constant=refuse)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "r3patch.observe.trace"]


def some_stats() -> ReplayStats:
    main = RouterStats(
        "decoder.layers.1.mlp.router",
        0,
        "main",
        2,
        forward_calls=3,
        recompute_calls=3,
        rows_replayed=90,
        rows_live=6,
        topk=4,
        rows_measured=90,
        rows_differing=9,
        experts_shared=351,
    )
    mtp = RouterStats("mtp.layers.0.router", 0, "mtp", 1, forward_calls=3, rows_live=96)
    return ReplayStats((main, mtp), tokens=bytes([0, 1, 1, 2]), seconds=0.25)


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
    assert record["seconds"] == {"copy": 0.25}
    assert record["notes"]["mean_abs"] == 0.25
    assert record["expert_load"]["real"] == [[1, 1, 2]]
    assert record["error"]["type"] == "ValueError"
    assert len(record["error"]["text"]) == trace.MAX_ERROR_CHARACTERS
    assert record["versions"]["torch"] == torch.__version__


def test_every_field_is_in_the_documented_table(path: Path) -> None:
    """docs/observe.md names the fields of a record and of a router, no more and no fewer."""
    trace.write(trace.session("replay", stats=some_stats()))
    (record,), _ = trace.read(path)
    tables = re.findall(r"(?:^\|.*\n)+", FORMAT.read_text(), re.MULTILINE)
    documented = [re.findall(r"^\| `(\w+)`", table, re.MULTILINE) for table in tables]
    assert [*record, "dropped", "lost"] in documented
    assert sorted(record["routers"][0]) in [sorted(names) for names in documented]


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


def blocked(path: Path, how: str) -> None:
    """Puts something where the file of rank 0 should be, so that no byte gets there."""
    path.parent.mkdir()
    if how == "folder":
        path.mkdir()
    elif how == "full disk":
        path.symlink_to("/dev/full")
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.parent.rmdir()
        path.parent.write_text("a file where the folder should be")


@pytest.mark.parametrize("how", ["folder", "full disk", "file for a folder"])
def test_the_users_own_exception_goes_out_as_it_is(
    path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """What `write` meets at the end of a session never replaces what ended it."""
    blocked(path, how)

    def session() -> None:
        try:
            raise KeyError("the user's")
        except KeyError as error:
            trace.write(trace.session("replay", step=1, stats=some_stats(), error=error))
            raise

    for _ in range(3):
        with pytest.raises(KeyError, match="the user's"):
            session()
    (message,) = warnings(caplog)
    assert "cannot write" in message


def test_a_pipe_that_nobody_reads_does_not_stop_the_run(path: Path) -> None:
    """A full pipe loses records; it does not block."""
    blocked(path, "pipe")
    notes = {f"note_{i}": i / 7 for i in range(1000)}
    for _ in range(20):
        trace.write(trace.session("replay", notes=notes))


def test_a_read_only_folder_is_no_error_at_exit(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file system that turned read-only under the run; a permission would not stop root."""

    def refuse(*args: Any) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    trace.write(trace.session("replay"))
    (message,) = warnings(caplog)
    assert "Read-only file system" in message


def test_a_record_after_a_loss_says_how_many_are_missing(path: Path) -> None:
    """When the disk has room again the trace goes on, and counts what it lacks."""
    blocked(path, "folder")
    for step in range(3):
        trace.write(trace.session("replay", step=step))
    path.rmdir()
    for step in (3, 4):
        trace.write(trace.session("replay", step=step))
    first, second = trace.read(path)[0]
    assert (first["step"], first["lost"]) == (3, 3)
    assert "lost" not in second


def test_an_interrupt_is_not_swallowed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during a write ends the run."""

    def interrupt(*args: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trace.write(trace.session("replay"))


class UnspeakableError(Exception):
    """Neither str() nor float() nor repr() of it returns."""

    def _refuse(self) -> Any:
        raise RuntimeError("no")

    __str__ = __repr__ = __float__ = item = _refuse


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (np.int64(3), 3),
        (np.uint8(3), 3),
        (np.bool_(True), 1),
        (np.float32(0.5), 0.5),
        (np.array([0.25]), 0.25),
        (torch.tensor(3), 3),
        (torch.tensor([[0.5]]), 0.5),
        (torch.tensor(math.nan), "nan"),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (Decimal("0.5"), 0.5),
        (Fraction(1, 2), 0.5),
        (10**30, 1e30),
        ((1, [2.0]), [1, [2.0]]),
    ],
)
def test_numbers_of_any_library_are_numbers_in_the_trace(
    path: Path, value: Any, written: Any
) -> None:
    """A step counter is often a scalar of numpy or torch."""
    trace.write(trace.session("replay", notes={"n": value, "m": 1.0}))
    record = strict(path.read_text())
    assert record["notes"] == {"n": written, "m": 1.0}
    assert "dropped" not in record


def endless() -> list[Any]:
    value: list[Any] = []
    value += [value, value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        UnspeakableError(),
        torch.ones(3),
        np.ones(2),
        1j,
        10**400,
        object(),
        np.datetime64("2024-01-01"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_that_is_no_number_is_left_out_by_name(
    path: Path, caplog: pytest.LogCaptureFixture, value: Any
) -> None:
    """The rest of the record is written, twice; the log tells once."""
    trace._warn_dropped.cache_clear()
    for _ in range(2):
        notes = {"odd": value, "loss": 1.0}
        trace.write(trace.session("replay", step=value, notes=notes, stats=some_stats()))
    for line in path.read_text().splitlines():
        record = strict(line)
        assert record["dropped"] == ["step", "notes.odd"]
        assert record["notes"] == {"odd": None, "loss": 1.0}
        assert (record["step"], len(record["routers"])) == (None, 2)
    (message,) = warnings(caplog)
    assert "step, notes.odd" in message


@pytest.mark.parametrize(
    ("step", "written"),
    [(np.int64(3), 3), (torch.tensor(3), 3), (np.float64(3), 3), (Decimal(3), 3), (True, 1)],
)
def test_a_step_is_an_integer_in_the_trace(path: Path, step: Any, written: int) -> None:
    """Whatever library counted it."""
    trace.write(trace.session("record", step=step))
    assert repr(strict(path.read_text())["step"]) == repr(written)


@pytest.mark.parametrize("step", ["first", 2.5, math.nan, math.inf])
def test_a_step_that_is_no_integer_is_left_out_by_name(path: Path, step: Any) -> None:
    """The report orders by it."""
    trace.write(trace.session("record", step=step))
    record = strict(path.read_text())
    assert (record["step"], record["dropped"]) == (None, ["step"])


def test_notes_that_contain_themselves_are_left_out(path: Path) -> None:
    """No recursion, and no exponential walk."""
    trace.write(trace.session("replay", step=1, notes={"loop": endless()}))
    assert strict(path.read_text())["step"] == 1


def test_an_error_without_a_text_is_told_by_its_class(path: Path) -> None:
    """An exception of the user whose str() raises."""
    trace.write(trace.session("replay", error=UnspeakableError()))
    error = strict(path.read_text())["error"]
    assert error == {"type": "UnspeakableError", "text": "its text raises RuntimeError"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "that is a folder, name a file in it"),
        ("new/", "that is a folder, name a file in it"),
        ("file/run.jsonl", "file is not a folder"),
        ("file/new/run.jsonl", "file is not a folder"),
    ],
)
def test_a_path_that_cannot_be_written_is_an_error_at_import(
    tmp_path: Path, name: str, reason: str
) -> None:
    """Refused with its reason, and nothing is made on the disk."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"^R3PATCH_TRACE is .*: .*{reason}"):
        _config.read({"R3PATCH_TRACE": f"{tmp_path}/{name}"})
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_folder_that_this_process_may_not_write_is_an_error_at_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest folder that exists is asked; root may write everywhere, so the answer is ours."""
    asked: list[str] = []

    def refuse(folder: os.PathLike[str], mode: int) -> bool:
        asked.append(os.fspath(folder))
        return False

    monkeypatch.setattr(os, "access", refuse)
    with pytest.raises(ConfigError, match=f"this process cannot write to {tmp_path}"):
        _config.read({"R3PATCH_TRACE": str(tmp_path / "new" / "run.jsonl")})
    assert asked == [str(tmp_path)]


@pytest.mark.parametrize("name", ["run.jsonl", "new/run.jsonl", "a/b/c/run.jsonl"])
def test_a_folder_that_the_run_will_make_is_none(tmp_path: Path, name: str) -> None:
    """It is taken, and still nothing is made: a process may never open a session."""
    path = f"{tmp_path}/{name}"
    assert _config.read({"R3PATCH_TRACE": path}).trace == path
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_written_is_logged_once_and_stops_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An instrument must not end a training run."""
    path.parent.mkdir()
    path.mkdir()  # a directory where the file should be
    for _ in range(3):
        trace.write(trace.session("replay"))
    (record,) = [record for record in caplog.records if record.name == "r3patch.observe.trace"]
    assert "cannot write" in record.getMessage()


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
