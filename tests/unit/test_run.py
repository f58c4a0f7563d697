"""``r3patch run COMMAND...``: reaches what the command starts, and is out of its way."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from environment import LOOK, Environment, answer

from r3patch.cli import run

CUSTOMIZE = "import os, sys; sys.customized_by = __file__; sys.stdout.write('customized ')"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("run"))
    (made.folder / "train.py").write_text(LOOK)
    (made.folder / "train.sh").write_text('cd / && "$1" "$2"\n')
    return made


@pytest.fixture
def customized(environment: Environment) -> Iterator[Environment]:
    """With a sitecustomize of its own, as distributions and other tracers have one."""
    file = environment.site / "sitecustomize.py"
    file.write_text(CUSTOMIZE)
    yield environment
    file.unlink()


@pytest.mark.parametrize("separator", [(), ("--",)])
def test_what_the_command_starts_has_r3patch(
    environment: Environment, separator: tuple[str, ...]
) -> None:
    """Python by name, a shell script that starts it elsewhere, and its children."""
    script = environment.folder / "train.py"
    for command in (
        ("python", script),
        ("bash", environment.folder / "train.sh", environment.python, script),
        ("env", "python", "-m", "train"),
    ):
        assert answer(environment.r3patch("run", *separator, *command)) == "False True"


def test_the_command_keeps_its_pythonpath(environment: Environment, tmp_path: Path) -> None:
    """Ours goes first, once, and no empty entry, which would be the working directory."""
    first = run.environment({"PYTHONPATH": "/a:/b"})
    assert first["PYTHONPATH"] == f"{run.FOLDER}:/a:/b"
    assert run.environment(first) == first
    assert run.environment({"PYTHONPATH": ""})["PYTHONPATH"] == run.FOLDER
    assert run.environment({"HOME": "/h"}) == {"HOME": "/h", "PYTHONPATH": run.FOLDER}
    (tmp_path / "mine.py").write_text("print('mine')")
    done = environment.r3patch("run", "python", "-m", "mine", PYTHONPATH=str(tmp_path))
    assert answer(done) == "mine"


def test_a_sitecustomize_that_is_there_still_runs(customized: Environment) -> None:
    """Once, under its own name, as if ours had never stood before it."""
    code = "import sys, sitecustomize; print(sitecustomize.__file__ == sys.customized_by)"
    out = answer(customized.r3patch("run", "python", "-c", f"{code}; {LOOK}"))
    # The command line's own process is customised, too, and is the same process afterwards.
    assert out == "customized customized True\nFalse True"


def test_a_sitecustomize_that_fails_is_reported_by_python(customized: Environment) -> None:
    """As without us: Python's site says so and goes on, and r3patch is there still."""
    (customized.site / "sitecustomize.py").write_text("1 / 0")
    plain = customized.run("-c", LOOK)
    done = customized.r3patch("run", "python", "-c", LOOK)
    assert "ZeroDivisionError" in plain.stderr
    assert done.stderr.count("ZeroDivisionError") == 2
    assert (done.returncode, done.stdout) == (0, "False True\n")


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("bash", "-c", "exit 7"), 7),
        (("bash", "-c", "kill -TERM $$"), -signal.SIGTERM),
        (("python", "-c", "raise SystemExit(3)"), 3),
        (("true",), 0),
    ],
)
def test_the_exit_status_is_the_commands(
    environment: Environment, command: tuple[str, ...], status: int
) -> None:
    """Signals, too: the process becomes the command."""
    assert environment.r3patch("run", *command).returncode == status


@pytest.mark.parametrize(
    ("command", "status", "text"),
    [
        (("no-such-command",), 127, "r3patch run: no-such-command: not found"),
        (("./no-interpreter",), 127, "no interpreter for it"),
        (("/",), 126, "r3patch run: /: cannot be started: Permission denied"),
        (("./text",), 126, "cannot be started: Exec format error"),
        ((), 2, "no command, expected: r3patch run COMMAND..."),
        (("--",), 2, "no command"),
        (("--unknown",), 2, "unrecognized arguments: --unknown"),
    ],
)
def test_a_command_that_cannot_be_started_is_one_sentence(
    environment: Environment, command: tuple[str, ...], status: int, text: str
) -> None:
    """With the exit status that shells give; no traceback."""
    for name, content in (("no-interpreter", "#!/no/such\n"), ("text", "echo\n")):
        (environment.folder / name).write_text(content)
        (environment.folder / name).chmod(0o755)
    done = environment.r3patch("run", *command)
    assert done.returncode == status
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_a_python_without_r3patch_fails_where_it_imports_megatron(environment: Environment) -> None:
    """A child of another environment: loud there, and nothing else of it is disturbed."""
    away = environment.folder / "away"
    shutil.copytree(environment.site / "r3patch" / "_startup", away)
    shutil.move(environment.site / "r3patch", environment.folder / "kept")
    try:
        bad = environment.run("-c", LOOK, PYTHONPATH=str(away))
        assert answer(environment.run("-c", "print(1)", PYTHONPATH=str(away))) == "1"
    finally:
        shutil.move(environment.folder / "kept", environment.site / "r3patch")
    assert bad.returncode == 1
    assert "the command was started by `r3patch run`, but r3patch cannot be imported" in bad.stderr
    assert f"Install it for {environment.python}" in bad.stderr


def test_a_process_that_ignores_pythonpath_is_not_reached_and_help_says_so(
    environment: Environment,
) -> None:
    """python -I; `r3patch auto on` is for those."""
    assert answer(environment.r3patch("run", "python", "-I", "-c", LOOK)) == "False False"
    told = " ".join(environment.r3patch("run", "--help").stdout.split())
    assert "Processes that replace PYTHONPATH, or ignore it (python -I, -E, -S), are not" in told
