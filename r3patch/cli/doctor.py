"""``r3patch doctor``: is replay on, and what would keep it off."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any

import r3patch
from r3patch import _config
from r3patch._errors import R3PatchError
from r3patch.cli import _megatron, auto
from r3patch.labels.model import routers, verify
from r3patch.labels.scope import MAIN
from r3patch.labels.targets import TARGETS

#: Frameworks by their module, with the distribution that installs it.
FRAMEWORKS = {
    "miles": "miles",
    "slime": "slime",
    "verl": "verl",
    "nemo_rl": "nemo-rl",
    "skyrl": "skyrl",
    "skyrl_train": "skyrl-train",
    "areal": "areal",
    "swift": "ms-swift",
    "roll": "roll",
    "sglang": "sglang",
    "vllm": "vllm",
}


@dataclass(frozen=True)
class Finding:
    """Something that keeps replay off (``error``) or changes what it does (``warning``)."""

    level: str
    where: str
    text: str


@dataclass
class Examination:
    """Everything that doctor knows, as plain data."""

    parts: list[dict[str, str]] = field(default_factory=list)
    """What of r3patch works here. Only labels and bridges have a say in `ok`."""
    versions: dict[str, str | None] = field(default_factory=dict)
    frameworks: dict[str, str] = field(default_factory=dict)
    targets: list[dict[str, str]] = field(default_factory=list)
    environment: list[dict[str, str]] = field(default_factory=list)
    bridges: list[dict[str, str]] = field(default_factory=list)
    auto: list[dict[str, str]] = field(default_factory=list)
    routers: list[dict[str, Any]] | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(finding.level == "error" for finding in self.findings)

    def find(self, level: str, where: str, text: object) -> None:
        self.findings.append(Finding(level, where, str(text)))

    def judge(self, part: str, reason: str, lacking: str = "not here") -> None:
        state = lacking if reason else "good"
        self.parts.append({"part": part, "state": state, "reason": reason})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Exit status 0: labels and bridges work (and the model of --model can be replayed); 1: "
        "they do not. r3patch's own sessions and r3patch.testing may lack what they need of "
        "Megatron all the same: they are listed, and --json has them under `parts`."
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="build a model by this function, which takes no arguments and returns a module or a "
        "list of chunks, and examine its routers",
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="try r3patch.testing, which sets up torch.distributed and Megatron on this CPU, and "
        "build the model there",
    )


def run(args: argparse.Namespace) -> int:
    with redirect_stdout(sys.stderr):  # what Megatron and the model print is no part of the answer
        seen = examine(args.model, cpu=args.cpu)
    if args.json:
        print(json.dumps({"ok": seen.ok, **asdict(seen)}, indent=2))
    else:
        show(seen)
    return 0 if seen.ok else 1


def examine(model: str | None = None, *, cpu: bool = False) -> Examination:
    """Look at the process, and at a model where one is named."""
    seen = Examination()
    _import_megatron(seen)
    _examine_versions(seen)
    for name, state, detail in r3patch.status().targets:
        if name.startswith("bridge "):
            continue  # bridges are below, also those that are well
        seen.targets.append({"name": name, "state": state, "detail": detail})
        if state != "installed":
            seen.find("error", name, f"{state}: {detail}" if detail else state)
        elif detail:
            seen.find("warning", name, detail)
    for name, state, detail in r3patch.bridges.status():
        seen.bridges.append({"name": name, "state": state, "detail": detail})
        if state == "failed":
            seen.find("error", f"bridge {name}", detail)
    for variable in _config.TABLE.values():
        given = os.environ.get(variable.name)
        seen.environment.append(
            {
                "variable": variable.name,
                "value": variable.default if given is None else given,
                "set": "yes" if given is not None else "no",
                "effect": variable.effect,
            }
        )
    _examine_auto(seen)
    seen.judge("labels and bridges", "" if seen.ok else "see the errors below", "failed")
    seen.judge("sessions", _megatron.sessions())
    if cpu:
        seen.judge("testing", _megatron.testing())
    else:
        seen.judge("testing", "--cpu builds a tiny model by it", "not tried")
    if model is not None:
        _examine_model(seen, model, cpu=cpu)
    return seen


def _examine_auto(seen: Examination) -> None:
    for place in auto.places():
        if place.state != "off":
            where, off = str(place.folder), "" if _config.CONFIG.auto else "R3PATCH_AUTO=0 is set"
            seen.auto.append({"folder": where, "state": place.state, "detail": off or place.detail})
        if place.state not in ("off", "on"):
            seen.find("warning", f"r3patch auto in {place.folder}", place.detail)


def _import_megatron(seen: Examination) -> None:
    """Import what is patched: a target nobody imported says "pending", which answers nothing."""
    try:
        for module in dict.fromkeys(target.module for target in TARGETS):
            import_module(module)
    except Exception as error:  # whatever a broken installation raises is what we are here to say
        seen.find("error", "Megatron", f"cannot be imported: {type(error).__name__}: {error}")


def _examine_versions(seen: Examination) -> None:
    seen.versions["python"] = platform.python_version()
    seen.versions["r3patch"] = r3patch.__version__
    for module in ("torch", "megatron.core", "wrapt"):
        name = module.replace(".", "-")
        loaded = getattr(sys.modules.get(module), "__version__", None)
        seen.versions[name] = str(loaded) if loaded else _version(name)
    for module, distribution in FRAMEWORKS.items():
        if util.find_spec(module) is not None:
            seen.frameworks[module] = _version(distribution) or "found, without version"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _examine_model(seen: Examination, spec: str, *, cpu: bool) -> None:
    from r3patch.sessions import _preflight

    model = _build(spec, cpu=cpu)
    infos = routers(model)
    columns = sorted({i.layer_number for i in infos if i.scope == MAIN and i.layer_number})
    seen.routers = [
        {
            "name": info.name,
            "scope": info.scope,
            "layer_number": info.layer_number,
            "moe_ordinal": columns.index(info.layer_number)
            if info.scope == MAIN and info.layer_number in columns
            else None,
            "is_mtp_layer": getattr(info.module, "is_mtp_layer", None),
        }
        for info in infos
    ]
    if not columns:
        seen.find(
            "error", spec, "the model has no router in scope main: there is nothing to replay"
        )
    try:
        verify(model)
    except R3PatchError as error:
        seen.find("error", type(error).__name__, error)
    try:
        for problem in _preflight.problems(infos):
            seen.find(problem.level, f"{problem.name}: {problem.setting}", problem.text)
    except Exception as error:  # a config that is none of Megatron's: a session would fail so too
        seen.find("error", spec, f"its settings cannot be read: {type(error).__name__}: {error}")
    if infos:
        for setting, text in _megatron.faults(getattr(infos[0].module, "config", None)):
            seen.find("warning", setting, text)


def _build(spec: str, *, cpu: bool) -> Any:
    module, colon, function = spec.partition(":")
    if not (module and colon and function):
        raise R3PatchError(f"--model is {spec!r}, expected MODULE:FUNCTION, such as train:build.")
    sys.path.insert(0, str(Path.cwd()))
    with ExitStack() as stack:
        if cpu:
            from r3patch import testing

            stack.enter_context(testing.megatron_on_cpu())
        try:
            return getattr(import_module(module), function)()
        except Exception as error:
            hint = "" if cpu else " On a machine without a GPU, add --cpu."
            raise R3PatchError(
                f"{spec} did not build a model: {type(error).__name__}: {error}. It must take no "
                f"arguments and return a module or a list of chunks.{hint}"
            ) from error


def show(seen: Examination) -> None:
    """Print it for a reader; fits a terminal of 60 columns."""
    from r3patch.cli._terminal import console, paragraph, plain, table

    out = console()
    parts = [(p["part"], _colored(p["state"]), plain(p["reason"])) for p in seen.parts]
    out.print(table("What works here", ["part", "state", "reason"], parts))
    versions = [(name, version or "[red]not found[/]") for name, version in seen.versions.items()]
    versions += [(f"[dim]{name}[/]", version) for name, version in seen.frameworks.items()]
    out.print(table("Versions", [], versions))
    targets = [
        (t["name"].rpartition(".")[2], _colored(t["state"]), plain(t["detail"]))
        for t in seen.targets
    ]
    out.print(table("Constructors", ["class", "state", "reason"], targets))
    settings = [
        (v["variable"], plain(v["value"]) or "[dim]empty[/]", v["effect"]) for v in seen.environment
    ]
    out.print(table("Environment", ["variable", "value", "effect"], settings))
    bridges = [(b["name"], _colored(b["state"]), plain(b["detail"])) for b in seen.bridges]
    out.print(table("Other replay managers", ["manager", "state", "reason"], bridges))
    places = [(plain(a["folder"]), _colored(a["state"]), plain(a["detail"])) for a in seen.auto]
    if not places:
        places = [("[dim]none[/]", "off", "`r3patch auto on` writes one")]
    out.print(table("Start-up file", ["folder", "state", "detail"], places))
    if seen.routers is not None:
        headings = ["router", "scope", "layer", "MoE #", "is_mtp_layer"]
        rows = [
            ["[dim]-[/]" if value is None else plain(str(value)) for value in router.values()]
            for router in seen.routers
        ]
        out.print(table("Routers", headings, rows))
    for finding in seen.findings:
        color = "red" if finding.level == "error" else "yellow"
        out.print(
            f"[bold {color}]{finding.level}[/] [bold]{plain(finding.where)}[/]", overflow="fold"
        )
        out.print(paragraph(finding.text))
    lacking = [part["part"] for part in seen.parts if part["state"] == "not here"]
    if seen.ok and "sessions" in lacking:
        out.print(
            "[bold green]Good[/] for labels and bridges: other replay managers never reach an MTP "
            "router. [yellow]record and replay are not to be had here[/], see above."
        )
    elif seen.ok:
        what = "any router of the model" if seen.routers else "a router; --model looks at yours"
        out.print(f"[bold green]Good.[/] Nothing here keeps replay from {what}.")
    else:
        out.print("[bold red]Not good.[/] Replay would be refused, or miss routers: see above.")


def _colored(state: str) -> str:
    colors = {
        "installed": "green",
        "good": "green",
        "on": "green",
        "not here": "yellow",
        "not tried": "yellow",
        "pending": "yellow",
    }
    return f"[{colors.get(state, 'red')}]{state}[/]"
