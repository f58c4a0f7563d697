"""The table of `make engine`: the cases that an engine answered, and what each Megatron found.

    python tools/engine/table.py RUN [--write] ENVIRONMENT ...

RUN has ``payloads`` and ``checkpoints``; each environment has a Megatron and runs `replay.py`.
``--write`` puts the table into docs/engine-to-step.md.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

import pages  # noqa: E402  # its folder is on the path now

PAGE = ROOT / "docs" / "engine-to-step.md"
HEAD = (
    "| Megatron | checkpoint | engine | samples | rows | rows that differ "
    "| largest log-prob difference, alone / replayed | k3, alone / replayed | MTP rows replayed |"
)
#: Cases of HTTP that no sample can show.
WITHOUT_ROUTES = {
    "stream": "none: a streamed answer carries no routes (asserted)",
    "abort": "not asked: who hangs up gets no answer",
}


def main(run: Path, environments: list[Path], *, write: bool) -> None:
    lines = []
    for line in table(run, environments):
        print(line, flush=True)
        lines.append(line)
    if write:
        pages.write(PAGE, "engine", "\n".join(lines))


def table(run: Path, environments: list[Path]) -> Iterator[str]:
    payloads = run / "payloads"
    yield from cases(sorted(payloads.glob("*.json")))
    yield ""
    yield HEAD
    yield "| --- " * HEAD.count(" | ") + "| --- |"
    # Side by side: each of them is a process, or two that wait for one another.
    running = [replay(environment, payloads, run / "checkpoints") for environment in environments]
    for environment, process in zip(environments, running, strict=True):
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{environment}: {output[-6000:]}")
        yield from (line for line in output.splitlines() if line.startswith("| "))


def cases(files: list[Path]) -> Iterator[str]:
    """Samples of each case, a column for each engine."""
    engines = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    counts: dict[str, dict[str, str]] = {case: {} for case in WITHOUT_ROUTES}
    for name, engine in engines.items():
        found = collections.Counter[str]()
        for sample in engine["samples"]:
            found[sample["case"]] += _choices(sample)
        for case, count in found.items():
            counts.setdefault(case, {})[name] = str(count)
        for case in engine.get("unable", ()):
            counts.setdefault(case, {})[name] = "vLLM has it off for MLA on a CPU"
        if name.endswith("_http"):
            for case, said in WITHOUT_ROUTES.items():
                counts[case][name] = said
    yield f"| samples of the case | {' | '.join(engines)} |"
    yield "| --- " * len(engines) + "| --- |"
    for case in sorted(counts):
        yield f"| {case} | {' | '.join(counts[case].get(name, '') for name in engines)} |"


def _choices(sample: dict[str, Any]) -> int:
    return len(sample["response"]["choices"]) if "response" in sample else 1


def replay(environment: Path, payloads: Path, checkpoints: Path) -> subprocess.Popen[str]:
    python, script = environment / "bin" / "python", Path(__file__).with_name("replay.py")
    return subprocess.Popen(
        [python, "-W", "ignore", script, payloads, checkpoints],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


if __name__ == "__main__":
    run, *rest = sys.argv[1:]
    main(Path(run), [Path(name) for name in rest if name != "--write"], write="--write" in rest)
