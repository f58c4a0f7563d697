"""doctor and inspect: the numbers they give, what they find, and how they fit a small terminal."""

from __future__ import annotations

import ast
import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from r3patch import Routes, cli
from r3patch.cli.inspect import suspicions

pytest.importorskip("rich")

NUM_TOKENS, NUM_EXPERTS, TOPK, LAYERS = 200, 32, 4, (2, 3, 4, 5)

REPLAYABLE = """
import sys, probe, r3patch
from r3patch import cli
import megatron.core.transformer.moe.router as router
def topk_function(logits, topk, router_replay=None, **rest): ...
router.topk_routing_with_score_function = topk_function
"""


def chosen(seed: int = 0, noise: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_TOKENS, len(LAYERS), NUM_EXPERTS)
    scores = torch.randn(shape, generator=generator)
    return (scores + noise * torch.randn(shape, generator=generator)).topk(TOPK).indices


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    def save(name: str, experts: torch.Tensor, valid: torch.Tensor | None = None) -> str:
        path = str(tmp_path / name)
        Routes(experts, LAYERS, valid, num_experts=NUM_EXPERTS).save(path)
        return path

    return save


@pytest.fixture
def inspect(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str]]:
    monkeypatch.setenv("COLUMNS", "60")

    def inspect(*args: str) -> tuple[int, str]:
        status = cli.main(["inspect", *args])
        out, err = capsys.readouterr()
        return status, out + err

    return inspect


def test_doctor_is_content_where_every_constructor_is_wrapped(fresh: Callable[..., str]) -> None:
    """Exit status 0, all targets installed, and Megatron was imported to know it."""
    out = fresh(REPLAYABLE + 'sys.exit = print\nprint(cli.main(["doctor", "--json"]))')
    *answer, status = out.strip().splitlines()
    seen = json.loads("\n".join(answer))
    assert status == "0"
    assert seen["ok"]
    assert [target["state"] for target in seen["targets"]] == ["installed"] * 3
    assert [v["value"] for v in seen["environment"]] == ["0", "govern", "auto", "0", ""]
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
        ("del router.topk_routing_with_score_function", {}, "router_replay"),
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
    assert "pip install 'r3patch[cli]'" in out
    assert "Traceback" not in out
    out = fresh(REPLAYABLE + 'sys.modules["rich"] = None\nprint(cli.main(["doctor", "--json"]))')
    assert out.strip().endswith("0")


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


def test_inspect_shows_shape_coverage_and_load(
    save: Callable[..., str], inspect: Callable[..., tuple[int, str]]
) -> None:
    """The facts of a healthy file, and exit status 0; every line fits 60 columns."""
    valid = torch.ones(NUM_TOKENS, dtype=torch.bool)
    valid[-10:] = False
    status, out = inspect(save("a.pt", chosen(), valid))
    assert status == 0
    assert "top-4 of 32" in out
    assert "4: 2-5" in out
    assert "760 of 800 (95.0%)" in out
    assert "No layer is suspicious." in out
    assert max(map(len, out.splitlines())) <= max(60, len(out.splitlines()[0]))


def test_inspect_finds_the_layers_that_no_router_chose() -> None:
    """Never captured, constant, copied from a neighbour, and one expert everywhere."""
    experts = chosen()
    experts[:, 1] = torch.arange(TOPK)
    experts[:, 3] = experts[:, 2]
    valid = torch.ones(NUM_TOKENS, len(LAYERS), dtype=torch.bool)
    valid[:, 0] = False
    found = dict(suspicions(Routes(experts, LAYERS, valid, num_experts=NUM_EXPERTS)))
    assert list(found) == [2, 3, 5]
    assert "no valid row" in found[2]
    assert "constant: every row is [0, 1, 2, 3]" in found[3]
    assert "equal to layer 4" in found[5]

    experts = chosen() % (NUM_EXPERTS - 1) + 1
    experts[:, 2] = torch.tensor([0, *range(1, TOPK)]) + torch.arange(NUM_TOKENS)[:, None] % 2
    experts[:, 2, 0] = 0
    found = dict(suspicions(Routes(_distinct(experts), LAYERS, num_experts=NUM_EXPERTS)))
    assert list(found) == [4]
    assert "one expert is in 100% of the rows" in found[4]


def _distinct(experts: torch.Tensor) -> torch.Tensor:
    """The same with the rows of other layers chosen anew, so that no id repeats."""
    fresh = chosen(3)
    fresh[:, 2] = experts[:, 2]
    return fresh


def test_inspect_of_a_suspicious_file_fails(
    save: Callable[..., str], inspect: Callable[..., tuple[int, str]]
) -> None:
    """So that a script can stop at it."""
    experts = chosen()
    experts[:, 1] = torch.arange(TOPK)
    status, out = inspect(save("a.pt", experts))
    assert status == 1
    assert "suspicious layer 3" in out


@pytest.mark.parametrize("kind", ["json", "b64", "npy"])
def test_inspect_reads_raw_payloads(
    kind: str, tmp_path: Path, inspect: Callable[..., tuple[int, str]]
) -> None:
    """The same numbers from JSON, base64 of flat int32, and .npy; sizes come by option."""
    # The engine sends the dense first layer too, as zeros.
    experts = torch.nn.functional.pad(chosen()[:-1].int(), (0, 0, 1, 0))
    path = tmp_path / f"payload.{kind}"
    if kind == "json":
        path.write_text(json.dumps({"routed_experts": experts.tolist()}))
    elif kind == "b64":
        path.write_bytes(base64.b64encode(experts.numpy().tobytes()) + b"\n")
    else:
        pytest.importorskip("numpy").save(path, experts.numpy())
    sizes = ["--num-tokens", "200", "--num-experts", "32", "--topk", "4", "--num-layers", "5"]
    status, out = inspect(str(path), *sizes, "--moe-layers", "2-5")
    assert status == 0, out
    assert "4: 2-5" in out
    assert "796 of 800" in out


def test_inspect_asks_for_the_sizes_of_a_payload(
    tmp_path: Path, inspect: Callable[..., tuple[int, str]]
) -> None:
    """What a payload does not say is asked for by the names of the options."""
    path = tmp_path / "payload.json"
    path.write_text("[]")
    status, out = inspect(str(path), "--topk", "4")
    assert status == 1
    assert "add --num-tokens, --num-experts, --num-layers" in out


def test_inspect_of_two_files_says_where_they_differ(
    save: Callable[..., str], inspect: Callable[..., tuple[int, str]]
) -> None:
    """Layer by layer; equal files are exit status 0, others 1, as diff has it."""
    a, other = chosen(), chosen()
    other[:50, 2] = chosen(9)[:50, 2]
    path = save("a.pt", a)
    assert inspect(path, path)[0] == 0
    status, out = inspect(path, save("b.pt", other))
    assert status == 1
    row = next(line.split() for line in out.splitlines() if line.startswith("4 "))
    assert row[:3] == ["4", "200", "25.0%"]
    assert "6.2% of rows differ" in out
    assert "25.0% of tokens differ" in out
    assert "shifted" not in out


@pytest.mark.parametrize(
    ("axis", "by", "text"),
    [(1, 1, "+1 MoE layer"), (1, -1, "-1 MoE layer"), (0, 1, "+1 token"), (0, -2, "-2 token")],
)
def test_inspect_recognises_a_shift_by_layers_or_tokens(
    axis: int,
    by: int,
    text: str,
    save: Callable[..., str],
    inspect: Callable[..., tuple[int, str]],
) -> None:
    """Routes that are off by a layer or a token are named as such, with the sign."""
    status, out = inspect(
        save("a.pt", chosen()), save("b.pt", chosen(noise=0.02).roll(by, dims=axis))
    )
    out = " ".join(out.split())
    assert status == 1
    assert "not the same tokens, layers and weights" in out
    assert f"The second is shifted by {text}" in out
    assert out.count("shifted by") == 1


def test_inspect_of_a_missing_file_is_one_line(inspect: Callable[..., tuple[int, str]]) -> None:
    """No traceback."""
    status, out = inspect("nowhere.pt")
    assert status == 1
    assert out.startswith("r3patch inspect: ")
    assert out.count("\n") == 1


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
