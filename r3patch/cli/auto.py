"""``r3patch auto``: r3patch in every process of this environment that imports Megatron.

Three files in a site directory, which Python reads when it starts: a module, the ``.pth`` that
calls it, and the ``.start`` that does the same from Python 3.15 on (PEP 829). They are written when
a user asks for them; the wheel has none.
"""

from __future__ import annotations

import argparse
import os
import py_compile
import re
import site
import subprocess
import sys
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from r3patch import _config, _startup
from r3patch._errors import R3PatchError
from r3patch._version import version

MODULE = "_r3patch_auto"
_VERSION = re.compile(r"# Written by r3patch (\S+):")


@dataclass(frozen=True)
class Place:
    """A site directory, and what of ours it holds."""

    folder: Path
    state: str
    """``off``, ``on``, ``stale`` (of another version, or changed) or ``incomplete``."""
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("switch", choices=["on", "off", "status"])
    parser.epilog = (
        "on: write the start-up files, into the environment of the Python that runs this. off: "
        "take them out again. status: exit status 0 if they are there and of this version, else 1. "
        "Every Python of the environment reads them, but for `python -S`; R3PATCH_AUTO=0 keeps "
        "a process from it."
    )


def run(args: argparse.Namespace) -> int:
    if args.switch == "on":
        return _switch_on()
    if args.switch == "off":
        return _switch_off()
    return _tell()


def places() -> list[Place]:
    """Every site directory that this Python reads, that of its own environment first."""
    folders = [home(), *map(Path, site.getsitepackages())]
    if site.ENABLE_USER_SITE:
        folders.append(Path(site.getusersitepackages()))
    return [_examine(folder) for folder in dict.fromkeys(folders)]


def home() -> Path:
    """The site directory to write to: where r3patch is installed, here or in the user's own.

    An r3patch that is found on PYTHONPATH, or in the Python below a virtual environment, is in
    neither: then the environment's own.
    """
    own = [Path(sysconfig.get_path("purelib"))]
    if site.ENABLE_USER_SITE:
        own.append(Path(site.getusersitepackages()))
    installed = _installed_in()
    return next((folder for folder in own if folder == installed), own[0])


def _installed_in() -> Path | None:
    try:
        return Path(str(metadata.distribution("r3patch").locate_file("")))
    except metadata.PackageNotFoundError:
        return None


def files() -> dict[str, str]:
    """What is written, by name; a module before what calls it."""
    code = (Path(_startup.__file__).parent / f"{MODULE}.py").read_text(encoding="utf-8")
    return {
        f"{MODULE}.py": f"# Written by r3patch {version()}: `r3patch auto off` removes it.\n{code}",
        f"{MODULE}.pth": f"import {MODULE}; {MODULE}.start()\n",
        f"{MODULE}.start": f"{MODULE}:start\n",
    }


def _examine(folder: Path) -> Place:
    wanted = files()
    found = {name: _read(folder / name) for name in wanted}
    missing = [name for name, text in found.items() if text is None]
    if len(missing) == len(wanted):
        return Place(folder, "off", "")
    again = "run `r3patch auto on` again"
    if missing:
        return Place(folder, "incomplete", f"{', '.join(missing)} is missing: {again}")
    if found == wanted:
        return Place(folder, "on", f"r3patch {version()}")
    writer = _VERSION.match(found[f"{MODULE}.py"] or "")
    who = writer.group(1) if writer else "an unknown version"
    what = "but changed" if who == version() else f"this is {version()}"
    return Place(folder, "stale", f"written by r3patch {who}, {what}: {again}")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _switch_on() -> int:
    folder = home()
    _refuse_managed(folder)
    _refuse_absent()
    before = _examine(folder).state
    if before != "on":
        _write(folder)
    if not _ask_new_python("any(getattr(f, 'is_r3patch', False) for f in sys.meta_path)"):
        raise R3PatchError(
            f"the files are in {folder}, but a new {sys.executable} does not read them: is that "
            "no site directory of its, or its `site` module switched off?"
        )
    print(f"r3patch auto is on{' already' if before == 'on' else ''}: {folder / MODULE}.pth")
    print(
        f"Every Python that reads this folder imports r3patch {version()} when it imports "
        "megatron.core; others are as before. `python -S` does not read it. R3PATCH_AUTO=0 keeps a "
        "process from it, `r3patch auto off` removes it."
    )
    return 0


def _refuse_managed(folder: Path) -> None:
    """The Python of an operating system belongs to its package manager (PEP 668)."""
    marker = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    is_system = sys.prefix == sys.base_prefix and folder == Path(sysconfig.get_path("purelib"))
    if is_system and marker.exists() and _installed_in() != folder:
        raise R3PatchError(
            f"{sys.executable} belongs to the operating system ({marker}), and r3patch is not "
            f"installed in it: no start-up file is written to {folder}. Install r3patch into a "
            "virtual environment and run its `r3patch auto on`, or use `r3patch run COMMAND...`."
        )


def _refuse_absent() -> None:
    if not _ask_new_python("importlib.util.find_spec('r3patch.cli') is not None"):
        raise R3PatchError(
            f"a new {sys.executable} does not find r3patch, only this process does (by PYTHONPATH "
            "or its working directory): every process that imports megatron.core would fail. "
            "Install r3patch into this environment first, from a checkout: pip install ."
        )


def _ask_new_python(question: str) -> bool:
    """The answer of an interpreter that has nothing but its environment."""
    leave_out = ("PYTHONPATH", "R3PATCH_", "PYTHONSTARTUP")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(leave_out)}
    done = subprocess.run(
        [sys.executable, "-c", f"import importlib.util, sys; sys.exit(not {question})"],
        cwd=os.sep,
        env=environ,
        check=False,
        capture_output=True,
    )
    return done.returncode == 0


def _write(folder: Path) -> None:
    """A module before what calls it: files without a .pth do nothing."""
    new = folder / f"{MODULE}.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)  # the user's own may not be there yet
        for name, text in files().items():
            new.write_text(text, encoding="utf-8")
            new.replace(folder / name)  # a Python that starts meanwhile sees a whole file
        # Who may not write here would compile it at every start.
        py_compile.compile(str(folder / f"{MODULE}.py"))
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise R3PatchError(
            f"{folder} cannot be written: {error.strerror}. Run this as the owner of the "
            "environment, install r3patch into one of your own (python -m venv), or use `r3patch "
            "run COMMAND...`, which writes nothing."
        ) from error


def _switch_off() -> int:
    own = {home(), Path(sysconfig.get_path("purelib")), Path(site.getusersitepackages())}
    found = [place for place in places() if place.state != "off"]
    for place in found:
        if place.folder not in own:
            print(
                f"r3patch auto is still on in {place.folder}, which belongs to another "
                "environment: run its own `r3patch auto off`, or set R3PATCH_AUTO=0"
            )
            continue
        try:
            _remove(place.folder)
        except OSError as error:
            raise R3PatchError(
                f"{place.folder} cannot be written: {error.strerror}. Run this as the owner of "
                "the environment; R3PATCH_AUTO=0 keeps a process from it meanwhile."
            ) from error
        print(f"r3patch auto is off: removed {place.folder / MODULE}.*")
    if not found:
        print("r3patch auto is off already")
    return 0 if all(place.folder in own for place in found) else 1


def _remove(folder: Path) -> None:
    """What calls the module before the module itself."""
    compiled = folder.glob(f"__pycache__/{MODULE}.*.pyc")
    for path in (*(folder / name for name in reversed(files())), *compiled):
        path.unlink(missing_ok=True)


def _tell() -> int:
    seen = [place for place in places() if place.state != "off"]
    for place in seen:
        print(f"r3patch auto is {place.state}: {place.folder / MODULE}.pth ({place.detail})")
    if not seen:
        print("r3patch auto is off")
    if not _config.CONFIG.auto:
        print("R3PATCH_AUTO=0 is set here, so no process of this shell would be reached")
    return 0 if seen and all(place.state == "on" for place in seen) else 1
