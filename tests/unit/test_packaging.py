"""What is shipped, what it requires, and the checks that guard it."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def built(target: str, folder: Path) -> Path:
    done = run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", folder)
    assert done.returncode == 0, done.stderr
    (file,) = folder.iterdir()
    return file


def sources(*folders: str) -> set[str]:
    files = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {file.relative_to(ROOT).as_posix() for file in files if "__pycache__" not in file.parts}


def section(name: str) -> dict[str, str]:
    """The lists of a table of pyproject.toml as text (tomllib is there from Python 3.11)."""
    text = PROJECT.split(f"[{name}]")[1].split("\n[")[0]
    return dict(re.findall(r"^([\w-]+) = (\[.*\])$", text, re.MULTILINE))


def test_wrapt_is_the_one_requirement() -> None:
    """torch and Megatron are often source checkouts: pip must never replace them."""
    assert re.findall(r'"([a-z0-9-]+)', section("project")["dependencies"]) == ["wrapt"]


def test_extras_are_for_users_and_groups_for_developers() -> None:
    """No tool of ours is an extra, and everything that a developer installs is in one group."""
    extras, groups = section("project.optional-dependencies"), section("dependency-groups")
    assert set(extras) == {"rollout", "cli", "report", "megatron", "demo"}
    included = re.findall(r'include-group = "(\w+)"', groups.pop("dev"))
    assert set(included) == set(groups)
    tools = {name for group in groups.values() for name in re.findall(r'"([a-z-]+)', group)}
    assert {"pytest", "ruff", "mypy", "pyright"} <= tools
    assert not any(f'"{tool}' in extra for tool in tools for extra in extras.values())


def test_the_version_is_that_of_the_project_and_the_changelog() -> None:
    """One version, in three places."""
    version = metadata.version("r3patch")
    assert f'\nversion = "{version}"\n' in PROJECT
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_extra_that_a_text_names_exists() -> None:
    """An error or a page that says `pip install r3patch[x]` names an extra that there is."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "r3patch").rglob("*.py")]
    named = {
        extra
        for page in pages
        for names in re.findall(r"(?:r3patch|\.)\[([a-z,]+)\]", page.read_text(encoding="utf-8"))
        for extra in names.split(",")
    }
    assert named
    assert named <= set(section("project.optional-dependencies"))


def test_the_wheel_holds_the_package_its_types_and_its_licence(tmp_path: Path) -> None:
    """All of r3patch/, py.typed, the licence, the command, verl's entry; nothing of tests."""
    with zipfile.ZipFile(built("wheel", tmp_path)) as archive:
        names = set(archive.namelist())
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        commands = archive.read(f"{info}/entry_points.txt").decode()
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
    package = sources("r3patch")
    assert "r3patch/py.typed" in package
    assert {name for name in names if not name.startswith(info)} == package
    assert "r3patch = r3patch.cli:main" in commands
    assert "[verl.plugins]\nr3patch = r3patch\n" in commands
    assert licence == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


@pytest.mark.slow
def test_the_sdist_carries_what_its_tests_run(tmp_path: Path) -> None:
    """Every test, page, example, benchmark and tool, and the tests can be collected there."""
    with tarfile.open(built("sdist", tmp_path / "dist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("r3patch-*")
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    wanted = sources("r3patch", "tests", "docs", "examples", "benchmarks", "tools")
    assert wanted | {"README.md", "CONTRIBUTING.md", "Makefile", "constraints.txt"} <= files
    # Not `python -m pytest`, which would find the unpacked package before the installed one.
    pytest_itself = Path(sys.executable).with_name("pytest")
    collected = run(pytest_itself, "--collect-only", "-q", "-p", "no:cacheprovider", cwd=unpacked)
    assert collected.returncode == 0, collected.stdout[-3000:]


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
def test_a_link_that_leads_somewhere_is_no_problem(tmp_path: Path, link: str) -> None:
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
def test_a_link_that_leads_nowhere_is_named_with_its_line(
    tmp_path: Path, text: str, target: str
) -> None:
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


@pytest.fixture(scope="module")
def _imported_for_good() -> None:
    """What pytester's runs import is forgotten after them, and torch cannot be imported twice."""
    importlib.import_module("megatron.core.transformer")


@pytest.mark.megatron
@pytest.mark.usefixtures("_imported_for_good")
@pytest.mark.parametrize(
    ("module", "mark", "body", "ci", "outcome"),
    [
        ("", "", "pytest.skip('why')", "true", "failed"),
        ("", "", "pytest.skip('why')", "", "skipped"),
        ("pytest.importorskip('no_such_module')", "", "pass", "true", "errors"),
        ("", "@pytest.mark.xfail", "assert 0", "true", "xfailed"),
        ("", "@pytest.mark.feature('config:no_such_field')", "pass", "true", "deselected"),
        ("", "@pytest.mark.feature('module:no_such_module:x')", "pass", "true", "deselected"),
        ("", "@pytest.mark.feature('module:pathlib:Path.no_such')", "pass", "true", "deselected"),
        ("", "@pytest.mark.feature('module:pathlib:Path.exists')", "pass", "true", "passed"),
        ("", "@pytest.mark.feature('config:num_moe_experts')", "pass", "true", "passed"),
    ],
)
def test_ci_fails_on_a_skipped_megatron_test(
    pytester: pytest.Pytester, module: str, mark: str, body: str, ci: str, outcome: str
) -> None:
    """Skipped is failed in CI, alone or with its whole file; a lacking feature is deselected."""
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(SKIPS.format(module=module, mark=mark, body=body))
    config = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(pytester.path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", ci)
        ran = pytester.runpytest_inprocess(*config, "-p", "no:cacheprovider", str(pytester.path))
    assert ran.parseoutcomes() == {outcome: 1}
