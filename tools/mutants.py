"""Mutation testing: plausible mistakes, one at a time, and whether the tests notice.

    python tools/mutants.py                         # all of them: about an hour
    python tools/mutants.py --only sessions/_tap    # of one file, or one mutant: --only _tap.py:72
    python tools/mutants.py --list                  # the table of what was run before

The mistakes are written by hand, in tests/mutants/*.toml: a text that stands once in a file, what
takes its place, the tests that are to notice, and for a mutant that no test can kill the reason.
Run it in an environment that has the dependencies of the tests (make lint makes one), on Python
3.11 or newer.

Each mutant runs in a copy of the tree, with the tests that passed there just before without it, in
a fork of this process, which has imported torch and Megatron already (half of the time, otherwise).
It is killed by a test that fails or by a run that takes far too long. A test that cannot be
collected or lacks an import kills nothing: the mutant is broken, and mended in the table. Results
are kept in .venv/mutants.json until the file, the mutant or its tests change.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import hashlib
import importlib.util
import json
import os
import py_compile
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from xml.etree import ElementTree as ET

import tomllib  # type: ignore[import-not-found]  # mypy reads as 3.10 does

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "tests" / "mutants"
RESULTS = ROOT / ".venv" / "mutants.json"
_COPIED = ("r3patch", "tests", "benchmarks", "examples", "docs", "pyproject.toml", "README.md")
#: A failure of this kind says that the mutant is no program, not that a test has noticed it.
_NO_KILL = re.compile(r"collection failure|ImportError|ModuleNotFound|NameError|SyntaxError")
#: At least so many seconds, and so many times what the tests take without the mutant.
_PATIENCE = (60, 6)
_PRELOADED = (
    "torch",
    "numpy",
    "hypothesis",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.transformer.moe.router_replay",
    "megatron.core.transformer.multi_token_prediction",
)


@dataclass(frozen=True)
class Mutant:
    """A mistake, and who is to notice it."""

    path: str
    old: str
    new: str
    tests: tuple[str, ...]  # arguments of pytest
    survives: str = ""  # why no test can kill it

    @property
    def line(self) -> int:
        """Where it is, counted from 1."""
        text = (ROOT / self.path).read_text()
        return text[: text.index(self.old)].count("\n") + 1

    @property
    def name(self) -> str:
        return f"{self.path}:{self.line}"

    @property
    def key(self) -> str:
        """Of all that the result depends on, but for the other files of the package."""
        files = [self.path, *(test.split("::")[0] for test in self.tests if "/" in test)]
        paths = [p for file in files for p in _sources(ROOT / file)]
        texts = [self.old, self.new, *self.tests, *(path.read_text() for path in paths)]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]

    def applied(self) -> str:
        """The file with the mistake in it.

        Raises:
            ValueError: the text to change is not there exactly once, or the result is no Python.
        """
        text = (ROOT / self.path).read_text()
        if text.count(self.old) != 1 or self.old == self.new:
            raise ValueError(f"{self.path}: {self.old!r} is there {text.count(self.old)} times")
        changed = text.replace(self.old, self.new)
        compile(changed, self.path, "exec")
        return changed


def _sources(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def table() -> Iterator[Mutant]:
    """The mutants of all tables."""
    for path in sorted(TABLES.glob("*.toml")):
        for file in tomllib.loads(path.read_text())["file"]:
            for mutant in file["mutant"]:
                tests = tuple(mutant.pop("tests", file["tests"]))
                yield Mutant(file["path"], tests=tests, **mutant)


class Tree:
    """A copy of the tree to make mistakes in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        for name in _COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, root / name)
        # Bytecode goes by the size and second of its source, which two mutants can share; that of
        # this mode goes by the contents.
        checked = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(root / "r3patch", quiet=1, invalidation_mode=checked)
        self._seconds: dict[tuple[str, ...], float] = {}

    def judge(self, mutant: Mutant) -> str:
        """``killed``, ``survived`` or ``broken``, with what the tests said."""
        seconds = self._unmutated(mutant.tests)
        file = self.root / mutant.path
        file.write_text(mutant.applied())
        try:
            return self._run(mutant.tests, max(_PATIENCE[0], _PATIENCE[1] * seconds))
        finally:
            shutil.copy(ROOT / mutant.path, file)

    def _unmutated(self, tests: tuple[str, ...]) -> float:
        """How long the tests take; they must pass."""
        if tests not in self._seconds:
            began = time.monotonic()
            result = self._run(tests, None)
            if not result.startswith("survived"):
                raise SystemExit(f"without any mutant {' '.join(tests)}: {result}")
            self._seconds[tests] = time.monotonic() - began
        return self._seconds[tests]

    def _run(self, tests: tuple[str, ...], limit: float | None) -> str:
        report, log = self.root / "report.xml", self.root / "log.txt"
        report.unlink(missing_ok=True)
        code = self._pytest(["-q", "-x", f"--junitxml={report}", *tests], log, limit)
        if code is None:
            return f"killed: not done after {limit:.0f} s"
        if code == 0:
            return "survived"
        found = [
            f"{case.get('name')}: {trouble.get('message', '')}"
            for case in (ET.parse(report).iter("testcase") if report.exists() else ())  # noqa: S314 - ours
            for trouble in case
            if trouble.tag in ("failure", "error")
        ]
        if code != 1 or not found or _NO_KILL.search(found[0]):
            last = log.read_text().strip().splitlines()[-1:]
            return f"broken: pytest ended with {code}: {(found or last)[0]}"
        return f"killed: {found[0]}"

    def _pytest(self, arguments: list[str], log: Path, limit: float | None) -> int | None:
        """Its exit status, from a fork of this process; None if it was stopped."""
        child = os.fork()
        if not child:
            self._become_pytest(arguments, log)
        began, done = time.monotonic(), 0
        try:
            while limit is None or time.monotonic() - began < limit:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.05)
            return None
        finally:  # by Ctrl-C, too
            if not done:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)

    def _become_pytest(self, arguments: list[str], log: Path) -> NoReturn:
        os.setsid()  # with what the tests start, to be stopped as one
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(self.root)
        os.environ["PYTHONPATH"] = sys.path[0] = str(self.root)
        try:
            package = importlib.util.find_spec("r3patch")
            assert package is not None
            assert Path(package.origin or "").is_relative_to(self.root), package.origin
            import pytest

            code = int(pytest.main(["-p", "no:cacheprovider", "-W", "ignore", *arguments]))
        except BaseException:  # noqa: BLE001 - nothing may go on in this process
            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        os._exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="whose path:line contains one")
    parser.add_argument("--list", action="store_true", help="run nothing, show known results")
    parser.add_argument("--again", action="store_true", help="forget what was run before")
    arguments = parser.parse_args()
    mutants = [mutant for mutant in table() if any(only in mutant.name for only in arguments.only)]
    for mutant in mutants:
        mutant.applied()
    keys = {mutant: mutant.key for mutant in mutants}  # of the tree as it is copied
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results = {} if arguments.again else {m: known[k] for m, k in keys.items() if k in known}
    if not arguments.list:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
        preload()
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            tree = Tree(Path(folder).resolve())
            for mutant in mutants:
                if mutant not in results:
                    results[mutant] = known[keys[mutant]] = tree.judge(mutant)
                    print(f"{mutant.name} {results[mutant][:120]!r}", flush=True)
                    RESULTS.parent.mkdir(exist_ok=True)
                    RESULTS.write_text(json.dumps(known, indent=0))
    return show(mutants, results)


def preload() -> None:
    """Import what every run would, but for the package and its tests."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as tests/conftest.py has it
    warnings.simplefilter("ignore")
    for name in _PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if "r3patch" in sys.modules:
        raise SystemExit("r3patch is imported here already: every run would test this one")


def show(mutants: list[Mutant], results: dict[Mutant, str]) -> int:
    """Print the table; 1 if a mutant is not killed and nobody says why."""
    counts: dict[str, Counter[str]] = {}
    for mutant in mutants:
        word = results.get(mutant, "not run").split(":")[0]
        counts.setdefault(mutant.path, Counter())[word] += 1
    print(f"\n{'file':34} mutants killed survived other")
    for path, words in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        killed, survived = words["killed"], words["survived"]
        other = words.total() - killed - survived
        print(f"{path:34} {words.total():7} {killed:6} {survived:8} {other:5}")
    unexplained = 0
    for mutant in mutants:
        result = results.get(mutant, "not run")
        if result.startswith("killed") and not mutant.survives:
            continue
        unexplained += not (result == "survived" and mutant.survives)
        print(f"\n{mutant.name}: {result}\n  - {_line(mutant.old)}\n  + {_line(mutant.new)}")
        if mutant.survives:
            print(f"  said to survive: {mutant.survives}")
    return int(unexplained > 0)


def _line(text: str) -> str:
    return " / ".join(line.strip() for line in text.strip().splitlines()) or "(nothing)"


if __name__ == "__main__":
    sys.exit(main())
