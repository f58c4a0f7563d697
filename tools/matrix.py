"""The tests that a release of Megatron, torch, wrapt or Python can break, on each that is in use.

    make matrix                                    # every cell that has no outcome for this source
    python tools/matrix.py [--only WORD ...] [--list] [--write PAGE]

A cell is an environment of tools/venv.sh with one other package before it on the path, unpacked in
build/matrix once. Its outcome, with the date, is kept there too, and a cell is run again when it
failed or the package has changed; a run that was stopped goes on where it was. ``--write`` puts the
table of the last outcomes between ``<!-- matrix -->`` and ``<!-- /matrix -->``. Exits 1 if a test
failed.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pages

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "matrix"
LABELS = ("tests/megatron/test_labels.py", "tests/megatron/test_label_specs.py")
SESSIONS = ("tests/megatron/test_sessions.py", "tests/megatron/test_recompute.py")
PATCHES = (
    "tests/unit/test_patch.py",
    "tests/unit/test_patch_failures.py",
    "tests/unit/test_scope.py",
    "tests/unit/test_import.py",
)
PURE = {"WRAPT_DISABLE_EXTENSIONS": "1"}
Outcome = dict[str, Any]


class Cell(NamedTuple):
    """Some tests in one environment."""

    what: str
    python: str
    tests: tuple[str, ...]
    """Files; tests of what the installed Megatron lacks deselect themselves."""
    overlay: str = ""
    """A requirement that goes before what the environment has."""
    whole: bool = False
    """With all that it requires: torch and the libraries that it loads."""
    env: dict[str, str] = {}  # noqa: RUF012


CELLS = {
    "labels": [
        *(
            Cell(f"Megatron {version}", "3.11", LABELS, f"megatron-core=={version}")
            for version in ("0.12.3", "0.13.1", "0.14.0", "0.15.3", "0.16.1")
        ),
        *(
            Cell(f"Megatron {version}", "3.12", LABELS, f"megatron-core=={version}")
            for version in ("0.17.1", "0.18.2", "0.19.2")
        ),
    ],
    "sessions": [
        Cell("Megatron 0.16.1", "3.11", SESSIONS, "megatron-core==0.16.1"),
        *(
            Cell(f"Megatron {version}", "3.12", SESSIONS, f"megatron-core=={version}")
            for version in ("0.17.1", "0.18.2", "0.19.2")
        ),
    ],
    "recompute": [
        Cell("torch 2.6", "3.11", SESSIONS[1:], "torch==2.6.0", whole=True),
        Cell("newest torch", "3.11", SESSIONS[1:], "torch", whole=True),
    ],
    "constructors": [
        Cell("wrapt 1.14", "3.11", PATCHES, "wrapt==1.14.1"),
        Cell("wrapt 1.14 without its extension", "3.11", PATCHES, "wrapt==1.14.1", env=PURE),
        Cell("newest wrapt", "3.11", PATCHES, "wrapt<3"),
        Cell("newest wrapt without its extension", "3.11", PATCHES, "wrapt<3", env=PURE),
    ],
    "unit": [
        Cell("Python 3.10", "3.10", ("tests/unit",)),
        Cell("Python 3.13", "3.13", ("tests/unit",)),
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="in a cell's title")
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table there")
    parser.add_argument("--checkouts", type=Path, help="a folder with a clone Megatron-LM: its dev")
    options = parser.parse_args()
    failed = []
    for group, cell in _wanted(options.only, options.checkouts):
        if not (options.list or _stands(_outcome(group, cell))):
            print(f"{group}: {cell.what} ...", file=sys.stderr, flush=True)
            _keep(group, cell, run(group, cell))
        outcome = _outcome(group, cell)
        print(f"{group}: {cell.what}: {_words(outcome)}", flush=True)
        if outcome and not outcome["good"]:
            failed.append(cell)
    if options.write:
        pages.write(options.write, "matrix", table())
    return 1 if failed else 0


def _wanted(words: list[str], checkouts: Path | None) -> Iterator[tuple[str, Cell]]:
    groups = dict(CELLS)
    if checkouts is not None:
        folder = checkouts.resolve() / "Megatron-LM"
        groups["dev"] = [Cell("Megatron's dev", "3.12", LABELS + SESSIONS, str(folder))]
    for group, cells in groups.items():
        for cell in cells:
            if all(word in f"{group} {cell.what}" for word in words):
                yield group, cell


def run(group: str, cell: Cell) -> Outcome:
    """The tests of a cell: what pytest counted, the versions, the date."""
    python = _environment(cell.python)
    path = [str(_unpacked(cell, python))] if cell.overlay else []
    versions = _run([python, "-c", _VERSIONS], path, cell.env, stdout=subprocess.PIPE).stdout.split(
        "\n"
    )[0]
    started = time.monotonic()
    junit = BUILD / f"{group}-{_slug(cell.what)}.xml"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    with (BUILD / f"{group}-{_slug(cell.what)}.log").open("w") as log:
        done = _run(
            [*command, "-m", "not wheel and not browser", *cell.tests],
            path,
            cell.env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return {
        "source": _source(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "seconds": round(time.monotonic() - started),
        "versions": versions + _commit(cell),
        "good": done.returncode == 0,
        "counts": _counts(junit) if junit.exists() else {"errors": 1},
    }


#: Megatron's from its files, which a checkout has too: importing it takes seconds.
_VERSIONS = """
import platform, runpy
from importlib import metadata
from pathlib import Path
import megatron
files = (Path(place, "core", "package_info.py") for place in megatron.__path__)
version = runpy.run_path(next(file for file in files if file.exists()))["__version__"]
megatron_core = version.partition("+")[0]  # of git it asks whatever repository it is run in
found = (f"{name} {metadata.version(name)}" for name in ("torch", "wrapt"))
print(f"Python {platform.python_version()}, megatron-core {megatron_core}", *found, sep=", ")
"""


def _run(
    command: list[str], path: list[str], env: dict[str, str], **streams: Any
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        **env,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("CI", None)  # there a skip is a failure
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, text=True, **streams)


def _counts(junit: Path) -> dict[str, int]:
    """By pytest's own report: ``tests``, ``failures``, ``errors``, ``skipped``."""
    (suite,) = re.findall(r"<testsuite [^>]*>", junit.read_text())
    junit.unlink()
    names = ("tests", "failures", "errors", "skipped")
    return {name: int(re.findall(rf'\b{name}="(\d+)"', suite)[0]) for name in names}


@functools.cache
def _environment(version: str) -> str:
    """The interpreter of tools/venv.sh's environment for a Python, with the wheel of this tree."""
    python = _printed("pythons.sh", version.partition(".")[2])
    if not python:
        raise SystemExit(f"there is no Python {version} on this machine")
    return str(ROOT / _printed("venv.sh", "dev", python) / "bin" / "python")


def _printed(script: str, *arguments: str) -> str:
    """What a script of this folder prints."""
    command = [str(ROOT / "tools" / script), *arguments]
    made = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return made.stdout.strip()


def _unpacked(cell: Cell, python: str) -> Path:
    """The folder of a cell's requirement: a checkout, or what pip unpacks."""
    if Path(cell.overlay).is_dir():
        return Path(cell.overlay)
    folder = BUILD / f"{_slug(cell.overlay)}-{cell.python}"
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        flags = ["--quiet", "--disable-pip-version-check", f"--target={folder}"]
        flags += [] if cell.whole else ["--no-deps"]
        command = [python, "-m", "pip", "install", *flags, cell.overlay]
        subprocess.run(command, check=True)
        (folder / "done").touch()
    return folder


def _commit(cell: Cell) -> str:
    """Of a checkout, which is between releases."""
    if not Path(cell.overlay).is_dir():
        return ""
    log = ["git", "-C", cell.overlay, "log", "-1", "--format=%h of %cs"]
    done = subprocess.run(log, check=True, capture_output=True, text=True)
    return f", commit {done.stdout.strip()}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _source() -> str:
    """What an outcome is of: the package, as it is now."""
    files = sorted((ROOT / "r3patch").rglob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _place(group: str, cell: Cell) -> Path:
    return BUILD / "outcomes" / f"{group}-{_slug(cell.what)}.json"


def _outcome(group: str, cell: Cell) -> Outcome:
    place = _place(group, cell)
    found: Outcome = json.loads(place.read_text()) if place.exists() else {}
    return found


def _stands(outcome: Outcome) -> bool:
    """Whether it need not be run again: it is good, and of the package as it is now."""
    return bool(outcome and outcome["good"] and outcome["source"] == _source())


def _keep(group: str, cell: Cell, outcome: Outcome) -> None:
    place = _place(group, cell)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({**outcome, "group": group, "what": cell.what}) + "\n")


def _words(outcome: Outcome) -> str:
    if not outcome:
        return "not run"
    counts = outcome["counts"]
    bad = counts.get("failures", 0) + counts.get("errors", 0)
    text = f"{counts.get('tests', 0) - bad - counts.get('skipped', 0)} passed"
    text += f", {bad} failed" if bad else ""
    return text + (f", {counts['skipped']} skipped" if counts.get("skipped") else "")


def table() -> str:
    """The last outcome of every cell that has one."""
    rows = ["| tests | with | outcome | versions | date |", "| --- | --- | --- | --- | --- |"]
    outcomes = [json.loads(file.read_text()) for file in (BUILD / "outcomes").glob("*.json")]
    order = [*CELLS, "dev"]
    for outcome in sorted(outcomes, key=lambda o: (order.index(o["group"]), o["what"])):
        cells = (outcome["group"], outcome["what"], _words(outcome))
        rows.append("| " + " | ".join((*cells, outcome["versions"], outcome["date"])) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
