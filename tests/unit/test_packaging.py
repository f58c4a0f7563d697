"""What is shipped, what it requires, and the checks that guard it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )


def test_wrapt_is_the_one_requirement():
    """torch and Megatron are often source checkouts: pip must never replace them."""
    required = re.search(r"^dependencies = (.*)$", PROJECT, re.MULTILINE)
    assert required
    assert re.findall(r'"([a-z0-9-]+)', required.group(1)) == ["wrapt"]


def test_the_version_is_that_of_the_project_and_the_changelog():
    """One version, in three places."""
    version = metadata.version("r3patch")
    assert f'\nversion = "{version}"\n' in PROJECT
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_extra_that_a_text_names_exists():
    """An error or a page that says `pip install r3patch[x]` names an extra that there is."""
    section = PROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "r3patch").rglob("*.py")]
    named = {
        extra
        for page in pages
        for names in re.findall(r"(?:r3patch|\.)\[([a-z,]+)\]", page.read_text(encoding="utf-8"))
        for extra in names.split(",")
    }
    assert named
    assert named <= extras


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_types_and_its_licence(tmp_path):
    """All of r3patch/, py.typed, the licence and the command; nothing of tests or tools."""
    built = run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
        commands = archive.read(f"{info}/entry_points.txt").decode()
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "r3patch").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "r3patch/py.typed" in sources
    assert {name for name in names if not name.startswith(info)} == sources
    assert "r3patch = r3patch.cli:main" in commands
    assert licence == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


PAGE = """# Title
## `R3PATCH_TRACE`
## Rows
## Rows and columns
## Rows
~~~
## Not a heading
[not a link](nowhere.md)
~~~
Literal `[x](nowhere.md)`, [the net](https://example.org/x#y), [source](code.py#L1).
"""


@pytest.mark.parametrize(
    "link", ["#r3patch_trace", "#rows-1", "page.md#rows-and-columns", "code.py"]
)
def test_a_link_that_leads_somewhere_is_no_problem(tmp_path, link):
    """Anchors as GitHub makes them: of code, of a heading's second copy; and files of any kind."""
    (tmp_path / "page.md").write_text(f"{PAGE}[there]({link})\n")
    (tmp_path / "code.py").touch()
    checked = run(sys.executable, ROOT / "tools" / "check_links.py", "page.md", cwd=tmp_path)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("[a](gone.md)", "gone.md: there is no gone.md"),
        ('[a](gone.md "a title")', "gone.md: there is no gone.md"),
        ("[`a`](gone.md)", "gone.md: there is no gone.md"),
        ("[![a](gone.png)](page.md)", "gone.png: there is no gone.png"),
        ("[a]: gone.md", "gone.md: there is no gone.md"),
        ("[a](#rows-2)", "#rows-2: page.md has no heading for #rows-2"),
        ("[a](#not-a-heading)", "#not-a-heading: page.md has no heading for #not-a-heading"),
    ],
)
def test_a_link_that_leads_nowhere_is_named_with_its_line(tmp_path, text, target):
    """File, line, target and what is missing, whatever the link's form."""
    (tmp_path / "page.md").write_text(f"{PAGE}{text}\n")
    (tmp_path / "code.py").touch()
    checked = run(sys.executable, ROOT / "tools" / "check_links.py", "page.md", cwd=tmp_path)
    assert checked.returncode == 1
    assert checked.stderr == f"page.md:11: {target}\n"


SKIPS = """
import pytest
{module}

@pytest.mark.megatron
{mark}
def test_it():
    {body}
"""


@pytest.mark.megatron
@pytest.mark.parametrize(
    ("module", "mark", "body", "ci", "closing"),
    [
        ("", "", "pytest.skip('why')", "true", "1 failed"),
        ("", "", "pytest.skip('why')", "", "1 skipped"),
        ("pytest.importorskip('no_such_module')", "", "pass", "true", "1 error"),
        ("", "@pytest.mark.xfail", "assert 0", "true", "1 xfailed"),
        ("", "@pytest.mark.feature('config:no_such_field')", "pass", "true", "1 deselected"),
        ("", "@pytest.mark.feature('module:no_such_module:x')", "pass", "true", "1 deselected"),
        ("", "@pytest.mark.feature('module:pathlib:Path.no_such')", "pass", "true", "1 deselected"),
        ("", "@pytest.mark.feature('module:pathlib:Path.exists')", "pass", "true", "1 passed"),
        ("", "@pytest.mark.feature('config:num_moe_experts')", "pass", "true", "1 passed"),
    ],
)
def test_ci_fails_on_a_skipped_megatron_test(tmp_path, module, mark, body, ci, closing):
    """Skipped is failed in CI, alone or with its whole file; a lacking feature is deselected."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(SKIPS.format(module=module, mark=mark, body=body))
    config = ("-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-p", "no:cacheprovider")
    ran = run(sys.executable, "-m", "pytest", "-q", *config, tmp_path, cwd=tmp_path, CI=ci)
    assert closing in ran.stdout.splitlines()[-1], ran.stdout + ran.stderr
