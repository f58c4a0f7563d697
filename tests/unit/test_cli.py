"""The commands, and doctor: what it finds, and how it fits a small terminal."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import r3patch
from r3patch import cli

pytest.importorskip("rich")

REPLAYABLE = """
import sys, probe, r3patch
from r3patch import cli
import megatron.core.transformer.moe.router as router
def topk_function(logits, topk, router_replay=None, **rest): ...
router.topk_routing_with_score_function = topk_function
"""


def test_doctor_is_content_where_every_constructor_is_wrapped(fresh: Callable[..., str]) -> None:
    """Exit status 0, all targets installed, and Megatron was imported to know it."""
    out = fresh(REPLAYABLE + 'sys.exit = print\nprint(cli.main(["doctor", "--json"]))')
    *answer, status = out.strip().splitlines()
    seen = json.loads("\n".join(answer))
    assert status == "0"
    assert seen["ok"]
    assert [target["state"] for target in seen["targets"]] == ["installed"] * 3
    assert [v["value"] for v in seen["environment"]] == [
        "0",
        "govern",
        "auto",
        "0",
        "warn",
        "",
        "1",
    ]
    assert seen["versions"]["python"]
    assert seen["routers"] is None


def test_doctor_json_is_nothing_but_json_whatever_megatron_prints(
    fresh: Callable[..., str],
) -> None:
    """What imports and model builders print goes to standard error."""
    out = fresh(
        REPLAYABLE
        + """
import contextlib, io, json, types
module = types.ModuleType("loud")
module.build = lambda: (print("building"), probe.build())[1]
sys.modules["loud"] = module
text = io.StringIO()
with contextlib.redirect_stdout(text):
    cli.main(["doctor", "--json", "--model", "loud:build"])
assert "building" not in text.getvalue()
json.loads(text.getvalue())
"""
    )
    assert "building" in out


@pytest.mark.parametrize(
    ("code", "env", "text"),
    [
        ("", {"R3PATCH_DISABLE": "1"}, "R3PATCH_DISABLE=1"),
        ("r3patch.uninstall()", {}, "disabled: uninstalled"),
        ("router.TopKRouter = type('TopKRouter', (), {})", {}, "imported or reloaded past"),
    ],
)
def test_doctor_fails_and_says_why_where_replay_is_off(
    fresh: Callable[..., str], code: str, env: dict[str, str], text: str
) -> None:
    """Each way to a replay that does nothing is exit status 1 and an error with its reason."""
    run = """
import contextlib, io, json
text = io.StringIO()
with contextlib.redirect_stdout(text):
    status = cli.main(["doctor", "--json"])
print(json.dumps([status, json.loads(text.getvalue())["findings"]]))
"""
    out = fresh(REPLAYABLE + code + run, **env)
    status, findings = json.loads(out.strip().splitlines()[-1])
    assert status == 1
    assert any(f["level"] == "error" and text in f["text"] for f in findings), findings


def test_doctor_tells_labels_sessions_and_testing_apart(fresh: Callable[..., str]) -> None:
    """Where only sessions are not to be had, it is good: exit status 0, with the reason."""
    out = fresh(
        REPLAYABLE
        + """
import contextlib, io, json
text = io.StringIO()
with contextlib.redirect_stdout(text):
    full = cli.main(["doctor", "--json"])
    before = len(text.getvalue())
    del router.topk_routing_with_score_function
    lacking = cli.main(["doctor", "--json"])
whole = text.getvalue()
parts = [json.loads(part)["parts"] for part in (whole[:before], whole[before:])]
print(json.dumps([[full, lacking], *parts]))
cli.main(["doctor"])
""",
        COLUMNS="200",
    )
    lines = out.strip().splitlines()
    (answers,) = (line for line in lines if line.startswith("[[0, 0]"))
    _, full, lacking = json.loads(answers)
    assert [p["part"] for p in full] == ["labels and bridges", "sessions", "testing"]
    assert [p["state"] for p in full] == ["good", "good", "not tried"]
    assert [p["state"] for p in lacking] == ["good", "not here", "not tried"]
    assert (
        "moe_utils.topk_routing_with_score_function. megatron-core 0.19.2 in /"
        in (lacking[1]["reason"])
    )
    assert "has no such function" in lacking[1]["reason"]
    assert "Good for labels and bridges" in out
    assert "Not good" not in out


def test_doctor_shows_the_start_up_files(fresh: Callable[..., str]) -> None:
    """Where they are, and a warning if they are another version's."""
    out = fresh(
        REPLAYABLE
        + """
import json, pathlib
from r3patch.cli import auto, doctor
place = auto.Place(pathlib.Path("/site"), "stale", "written by r3patch 1.2.3")
auto.places = lambda: [place, auto.Place(pathlib.Path("/user"), "off", "")]
seen = doctor.examine()
print(json.dumps([seen.ok, seen.auto, [f.text for f in seen.findings]]))
"""
    )
    ok, places, texts = json.loads(out.strip().splitlines()[-1])
    assert ok
    assert places == [{"folder": "/site", "state": "stale", "detail": "written by r3patch 1.2.3"}]
    assert texts == ["written by r3patch 1.2.3"]


def test_doctor_lists_the_routers_of_a_model_with_scope_layer_and_ordinal(
    fresh: Callable[..., str],
) -> None:
    """MTP routers have no MoE ordinal; Megatron's own flag stands next to the label."""
    out = fresh(
        REPLAYABLE
        + """
import json, types
from r3patch.cli import doctor
sys.modules["mine"] = types.SimpleNamespace(build=probe.build)
seen = doctor.examine("mine:build")
print(json.dumps([list(router.values())[1:] for router in seen.routers]))
"""
    )
    rows = json.loads(out.strip().splitlines()[-1])
    assert [row[:3] for row in rows[:2]] == [["main", 1, 0], ["main", 2, 1]]
    assert [(row[0], row[2]) for row in rows[2:]] == [("mtp", None)] * 2
    assert all(row[3] is False for row in rows[:2])


def test_doctor_reports_unlabelled_routers_of_a_model(fresh: Callable[..., str]) -> None:
    """A model that was built before the import is an error that names the routers."""
    out = fresh(
        """
import types, sys, probe
model = probe.build()
import r3patch
from r3patch.cli import doctor
sys.modules["mine"] = types.SimpleNamespace(build=lambda: model)
for finding in doctor.examine("mine:build").findings:
    print(finding.level, finding.where, finding.text)
"""
    )
    assert "error UnlabelledRouterError" in out
    assert "decoder.0" in out


def test_doctor_says_what_the_model_builder_must_be(fresh: Callable[..., str]) -> None:
    """A spec without a colon, and a builder that raises, end with one line and status 1."""
    out = fresh(
        REPLAYABLE
        + """
import types
sys.modules["mine"] = types.SimpleNamespace(build=lambda: 1 / 0)
print(cli.main(["doctor", "--model", "mine"]), cli.main(["doctor", "--model", "mine:build"]))
"""
    )
    assert "--model is 'mine', expected MODULE:FUNCTION" in out
    assert "mine:build did not build a model: ZeroDivisionError: division by zero" in out
    assert out.strip().endswith("1 1")


def test_doctor_prints_brackets_of_names_as_they_are(fresh: Callable[..., str]) -> None:
    """What looks like rich markup in a setting or a path is text."""
    out = fresh(
        REPLAYABLE
        + """
from r3patch.cli import doctor
seen = doctor.examine()
seen.find("warning", "cuda_graph_impl='local' over [moe]", "leave [moe] out")
doctor.show(seen)
"""
    )
    assert "over [moe]" in out
    assert "leave [moe] out" in out


@pytest.mark.parametrize("columns", [40, 60])
def test_doctor_fits_a_narrow_terminal(fresh: Callable[..., str], columns: int) -> None:
    """No line is longer than the terminal is wide, and no name is cut off."""
    out = fresh(
        REPLAYABLE
        + """
import types
sys.modules["mine"] = types.SimpleNamespace(build=probe.build)
sys.stderr = open("/dev/null", "w")
cli.main(["doctor", "--model", "mine:build"])
""",
        COLUMNS=str(columns),
    )
    assert max(map(len, out.splitlines())) <= columns
    if columns >= 60:
        assert "MultiTokenPredictionBlock" in out


def test_a_missing_extra_is_named(fresh: Callable[..., str]) -> None:
    """Without rich, doctor's tables say which extra to install; --json needs none."""
    out = fresh(REPLAYABLE + 'sys.modules["rich"] = None\nprint(cli.main(["doctor"]))')
    assert "this needs rich" in out
    assert "from a checkout of r3patch: pip install '.[cli]'" in out
    assert "Traceback" not in out
    out = fresh(REPLAYABLE + 'sys.modules["rich"] = None\nprint(cli.main(["doctor", "--json"]))')
    assert out.strip().endswith("0")


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [
        ("rich", "inspect x.pt", "cli"),
        ("rich", "demo", "cli"),
        (
            "torch",
            "inspect {tmp}/x.json --num-tokens 1 --num-experts 2 --topk 1 --num-layers 1",
            "megatron",
        ),
        ("torch", "demo", "megatron"),
    ],
)
def test_every_command_names_the_extra_that_it_lacks(
    fresh: Callable[..., str], tmp_path: Path, package: str, command: str, extra: str
) -> None:
    """One line and status 1 instead of a traceback."""
    (tmp_path / "x.json").write_text("[]")
    args = command.format(tmp=tmp_path).split()
    out = fresh(
        f"""
import sys
from r3patch import cli
sys.modules[{package!r}] = None
print(cli.main({args!r}))
"""
    )
    assert f"this needs {package}" in out
    assert f"pip install '.[{extra}]'" in out
    assert out.strip().endswith("1")


def test_the_report_needs_no_torch(fresh: Callable[..., str], tmp_path: Path) -> None:
    """A trace is read, judged and told where only the training machine has torch."""
    path = tmp_path / "run.jsonl"
    out = fresh(
        f"""
import sys
sys.modules["torch"] = None
from r3patch import cli
from r3patch.observe import trace
trace.write(trace.session("replay", step=1, error=ValueError("no")))
print(cli.main(["report", {str(path)!r}, "-o", {str(tmp_path / "page.html")!r}]))
""",
        R3PATCH_TRACE=str(path),
    )
    assert out.startswith("Not good. Did every session end without an error? 1 did not.")
    assert (tmp_path / "page.html").exists() or "pip install '.[report]'" in out


def test_the_package_runs_as_a_module_and_says_its_version() -> None:
    """`python -m r3patch --version`, where the script is not on the path."""
    command = [sys.executable, "-m", "r3patch", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"r3patch {r3patch.__version__}\n"


def test_help_imports_no_command(fresh: Callable[..., str]) -> None:
    """`r3patch --help` takes no torch-dependent module with it."""
    out = fresh(
        """
import sys
from r3patch import cli
try:
    cli.main(["--help"])
except SystemExit:
    pass
print([name for name in sys.modules if name.startswith("r3patch.cli.")])
"""
    )
    assert all(name in out for name in cli.COMMANDS)
    assert out.strip().endswith("[]")


def test_only_the_command_line_prints() -> None:
    """The library logs; a print in a training run is noise on every rank."""
    package = Path(cli.__file__).parents[1]
    printing = [
        f"{file.relative_to(package)}:{node.lineno}"
        for file in package.rglob("*.py")
        if package / "cli" not in file.parents
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert printing == []
