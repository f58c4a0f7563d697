"""What keeps the trace from being written never stops or masks the run that it is of."""

from __future__ import annotations

import math
import os
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from traces import some_stats, strict, switch_on

from r3patch import ConfigError, _config
from r3patch.observe import trace


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of rank 0, with the trace switched on."""
    return switch_on(tmp_path, monkeypatch)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "r3patch.observe.trace"]


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
