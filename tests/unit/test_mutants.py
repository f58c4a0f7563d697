"""The tables of tests/mutants fit the code, and tools/mutants.py tells a kill from an accident."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("tomllib")  # Python 3.11 and newer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    return importlib.import_module("mutants")


def test_every_mutant_still_applies(mutants: ModuleType) -> None:
    """Each text to change stands once in its file, the result is Python, and its tests exist."""
    table = list(mutants.table())
    assert len(table) > 100
    assert len(set(table)) == len(table)
    stale = []
    for mutant in table:
        try:
            mutant.applied()
        except ValueError as error:
            stale.append(str(error))
    assert not stale, "\n".join(stale)
    tests = {test.split("::")[0] for mutant in table for test in mutant.tests if "/" in test}
    assert not [test for test in tests if not (ROOT / test).exists()]


def test_a_text_that_is_not_there_once_is_refused(mutants: ModuleType) -> None:
    """A mutant whose place has changed, or is now one of two, does not rot in silence."""
    path = "r3patch/sessions/_passes.py"
    for old in ("no such text", "self"):
        with pytest.raises(ValueError, match=r"is there \d+ times"):
            mutants.Mutant(path, old, "pass", ("tests/unit/test_docs.py",)).applied()
    with pytest.raises(SyntaxError):
        mutants.Mutant(path, "import threading", "import", ()).applied()


FILES = {
    "r3patch/__init__.py": "def half(n):\n    return n // 2\n",
    "tests/test_sees.py": "import r3patch\ndef test_it(): assert r3patch.half(4) == 2\n",
    "tests/test_blind.py": "import r3patch\ndef test_it(): assert r3patch.half\n",
    "tests/test_fails.py": "def test_it(): assert False\n",
    "tests/test_calls.py": "import r3patch\ndef test_it(): r3patch.half(4)\n",
}
JUDGE = """
import sys, pathlib
sys.path.insert(0, {tools!r})
import mutants
mutants.ROOT = pathlib.Path({root!r})
mutants._COPIED, mutants._PATIENCE = ("r3patch", "tests"), ({limit}, 0)
tree = mutants.Tree(pathlib.Path({root!r}) / "copy")
mutant = mutants.Mutant("r3patch/__init__.py", "n // 2", {new!r}, ("tests/test_{test}.py",))
print(tree.judge(mutant))
assert (tree.root / mutant.path).read_text() == (mutants.ROOT / mutant.path).read_text()
"""


@pytest.mark.parametrize(
    ("new", "test", "result"),
    [
        ("n // 3", "sees", "killed: test_it: assert 1 == 2"),
        ("n // 3", "blind", "survived"),
        ("m // 2", "calls", "broken: .*NameError"),
        ("n // 2\nimport no_such_module", "sees", "broken: pytest ended with 2"),
        ("__import__('time').sleep(600)", "sees", "killed: not done after 1 s"),
        ("n // 3", "fails", "without any mutant tests/test_fails.py: killed"),
    ],
)
def test_only_a_failed_test_or_a_hang_kills(
    tmp_path: Path, new: str, test: str, result: str
) -> None:
    """What is no program, what nobody sees and what fails anyway is no kill; files are restored."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    limit = 1 if "sleep" in new else 100
    code = JUDGE.format(
        tools=str(ROOT / "tools"), root=str(tmp_path), new=new, test=test, limit=limit
    )
    # Another package of the name of ours: not to be counted as covered.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=env,
    )
    said = done.stdout if done.returncode == 0 else done.stderr
    assert re.match(result, said), done.stdout + done.stderr
