"""``r3patch auto on | off | status``: what is written where, and what stands in the way."""

from __future__ import annotations

import shutil
import site
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from environment import Environment, answer

import r3patch
from r3patch import cli
from r3patch.cli import auto

FILES = ["_r3patch_auto.pth", "_r3patch_auto.py", "_r3patch_auto.start"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Each test switches on what it needs."""
    return Environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site directory for commands that run in this process."""
    folder = tmp_path / "site-packages"
    monkeypatch.setattr(auto, "home", lambda: folder)
    monkeypatch.setattr(auto, "_ask_new_python", lambda question: True)
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(folder)])
    monkeypatch.setattr(site, "ENABLE_USER_SITE", False)
    return folder


def test_on_writes_three_files_and_off_takes_them_out_again(environment: Environment) -> None:
    """Both say where, both may be repeated, and status tells one from the other."""
    before = sorted(environment.site.rglob("*"))
    assert environment.r3patch("auto", "status").returncode == 1
    on = answer(environment.r3patch("auto", "on"))
    assert f"auto is on: {environment.site}/_r3patch_auto.pth" in on
    assert environment.written == FILES
    assert list(environment.site.glob("__pycache__/_r3patch_auto*"))  # compiled once and for all
    assert "is on already" in answer(environment.r3patch("auto", "on"))
    assert "is on: " in answer(environment.r3patch("auto", "status"))
    off = answer(environment.r3patch("auto", "off"))
    assert f"auto is off: removed {environment.site}/_r3patch_auto.*" in off
    assert "off already" in answer(environment.r3patch("auto", "off"))
    left = [path for path in environment.site.rglob("*") if "__pycache__" not in path.parts]
    assert left == [path for path in left if path in before]
    assert not list(environment.site.glob("__pycache__/_r3patch_auto*"))


def test_the_start_file_names_what_the_pth_file_calls(here: Path) -> None:
    """Python 3.15 reads `module:function` from .start, and then no import line of the .pth."""
    assert cli.main(["auto", "on"]) == 0
    assert (here / FILES[2]).read_text() == "_r3patch_auto:start\n"
    assert (here / FILES[0]).read_text() == "import _r3patch_auto; _r3patch_auto.start()\n"
    assert "\ndef start() -> None:" in (here / FILES[1]).read_text()


def test_the_start_file_may_be_read_twice(environment: Environment) -> None:
    """Python 3.15 resolves its line by `pkgutil`, and reads the folder of an environment twice."""
    answer(environment.r3patch("auto", "on"))
    code = """
import pkgutil, sys
line = open(sys.argv[1], encoding="utf-8-sig").read().strip()
for _ in range(2):
    pkgutil.resolve_name(line)()
print(sum(hasattr(finder, "is_r3patch") for finder in sys.meta_path))
"""
    assert answer(environment.run("-c", code, environment.site / FILES[2])) == "1"
    answer(environment.r3patch("auto", "off"))


def test_the_package_carries_no_start_up_file() -> None:
    """Nobody gets one unasked: they are written by `on` only."""
    package = Path(r3patch.__file__).parent
    assert not [path for path in package.rglob("*") if path.suffix in {".pth", ".start"}]


@pytest.mark.parametrize(
    ("change", "state"),
    [
        (lambda f: f.write_text(f.read_text().replace(" 1.2.3:", " 1.2.2:")), "stale"),
        (lambda f: f.write_text(f.read_text() + "\n"), "stale"),
        (lambda f: f.write_text("mine"), "stale"),
        (Path.unlink, "incomplete"),
    ],
)
def test_files_of_another_version_are_told_and_mended_by_on(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], object],
    state: str,
) -> None:
    """status: exit 1, the state and what to do; `on` writes them anew."""
    monkeypatch.setattr(auto, "version", lambda: "1.2.3")
    cli.main(["auto", "on"])
    change(here / "_r3patch_auto.py")
    capsys.readouterr()
    assert cli.main(["auto", "status"]) == 1
    told = capsys.readouterr().out
    assert f"auto is {state}: " in told
    assert "run `r3patch auto on` again" in told
    assert cli.main(["auto", "on"]) == 0
    assert cli.main(["auto", "status"]) == 0


def test_status_names_the_version_that_wrote_the_files(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And this one's: an upgrade of r3patch leaves the files behind."""
    monkeypatch.setattr(auto, "version", lambda: "1.2.3")
    cli.main(["auto", "on"])
    monkeypatch.setattr(auto, "version", lambda: "2.0.0")
    assert cli.main(["auto", "status"]) == 1
    assert "written by r3patch 1.2.3, this is 2.0.0" in capsys.readouterr().out


def test_on_refuses_an_environment_that_lacks_r3patch(environment: Environment) -> None:
    """Found by PYTHONPATH only, every process with Megatron would fail: nothing is written."""
    elsewhere = environment.folder / "elsewhere"
    shutil.move(environment.site / "r3patch", elsewhere / "r3patch")
    try:
        done = environment.r3patch("auto", "on", PYTHONPATH=str(elsewhere))
    finally:
        shutil.move(elsewhere / "r3patch", environment.site / "r3patch")
    assert done.returncode == 1
    assert "does not find r3patch, only this process does" in done.stderr
    assert "Traceback" not in done.stderr
    assert environment.written == []


@pytest.mark.parametrize("switch", ["on", "off"])
def test_a_folder_that_cannot_be_written_is_one_line(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    switch: str,
) -> None:
    """Exit 1, the folder and what to do, no traceback, and nothing half written."""
    if switch == "off":
        cli.main(["auto", "on"])

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse) if switch == "off" else None
    capsys.readouterr()
    assert cli.main(["auto", switch]) == 1
    monkeypatch.undo()
    told = capsys.readouterr().err
    assert told.startswith(f"r3patch auto: {here} cannot be written: Permission denied.")
    assert "owner of the environment" in told
    assert sorted(path.name for path in here.glob("_r3patch*")) == (
        FILES if switch == "off" else []
    )


def test_the_python_of_the_system_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEP 668: refused, unless r3patch is installed there and somebody has decided that already."""
    for name in ("stdlib", "purelib"):
        (tmp_path / name).mkdir()
    (tmp_path / "stdlib" / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    monkeypatch.setattr(site, "ENABLE_USER_SITE", False)
    monkeypatch.setattr(auto, "_ask_new_python", lambda question: True)
    monkeypatch.setattr(auto, "_installed_in", lambda: None)
    assert cli.main(["auto", "on"]) == 1
    told = capsys.readouterr().err
    assert "belongs to the operating system" in told
    assert "r3patch run COMMAND" in told
    assert list((tmp_path / "purelib").iterdir()) == []
    monkeypatch.setattr(auto, "_installed_in", lambda: tmp_path / "purelib")
    assert cli.main(["auto", "on"]) == 0


def test_the_files_go_where_r3patch_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment's own site directory, or the user's; never that of the Python below."""
    own, users = Path(sysconfig.get_path("purelib")), tmp_path / "users"
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(users))
    for enabled, installed, wanted in [
        (True, own, own),
        (True, users, users),
        (False, users, own),
        (True, tmp_path / "of-the-python-below", own),
        (True, None, own),
    ]:
        monkeypatch.setattr(site, "ENABLE_USER_SITE", enabled)
        monkeypatch.setattr(auto, "_installed_in", lambda installed=installed: installed)
        assert auto.home() == wanted


def test_off_leaves_what_belongs_to_another_environment(
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With two site directories status lists both, and off says which one it may not take."""
    below = tmp_path / "below"
    cli.main(["auto", "on"])
    shutil.copytree(here, below)
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(here), str(below)])
    capsys.readouterr()
    assert cli.main(["auto", "status"]) == 0
    assert capsys.readouterr().out.count("auto is on: ") == 2
    assert cli.main(["auto", "off"]) == 1
    told = capsys.readouterr().out
    assert f"removed {here}/_r3patch_auto.*" in told
    assert f"still on in {below}, which belongs to another environment" in told
    assert sorted(path.name for path in below.glob("_r3patch*")) == FILES


def test_two_start_up_files_arm_once(environment: Environment) -> None:
    """A second site directory, and `r3patch run` on top, change nothing."""
    answer(environment.r3patch("auto", "on"))
    second = environment.folder / "second"
    second.mkdir()
    for name in FILES:
        shutil.copy(environment.site / name, second)
    code = f"""
import site, sys
site.addsitedir({str(second)!r})
print(sum(hasattr(finder, "is_r3patch") for finder in sys.meta_path))
"""
    done = environment.r3patch("run", environment.python, "-c", code)
    answer(environment.r3patch("auto", "off"))
    assert answer(done) == "1"


def test_status_says_that_the_environment_switches_it_off(here: Path) -> None:
    """R3PATCH_AUTO=0 in the shell explains why a process of it is not reached."""
    from r3patch import _config

    assert cli.main(["auto", "on"]) == 0
    with _config.override(auto=False):
        assert cli.main(["auto", "status"]) == 0
