"""Frameworks' own replay code on stock Megatron, without and with r3patch, as one table.

    make downstream CHECKOUTS=folder          # clones of the frameworks, by their usual names
    python tools/downstream.py [CHECKOUTS] [--only NAME ...] [--write PAGE]

What is run is in tests/downstream. The answers are kept in build/downstream: without CHECKOUTS the
table is made of the last ones. ``--write`` puts it between ``<!-- downstream -->`` and
``<!-- /downstream -->`` of a page. Exits 1 if a call was wrong that r3patch answers for.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pages

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "tests" / "downstream" / "cells.py"
ANSWERS = ROOT / "build" / "downstream"
HEADS = (
    "framework",
    "commit",
    "model",
    "without r3patch",
    "with it: main calls wrong",
    "with it: MTP calls not Megatron's own",
)
Answer = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkouts", nargs="?", type=Path, help="the folder of the clones")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="as in drivers/")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table there")
    options = parser.parse_args()
    if options.checkouts:
        run(options.checkouts, governed=False, only=options.only)
        run(options.checkouts, governed=True, only=options.only)
    elif not (ANSWERS / "with.jsonl").exists():
        parser.error("name the folder of the clones: nothing has been run yet")
    without, governed = kept(governed=False), kept(governed=True)
    text = table(without, governed)
    print(text)
    if options.write:
        pages.write(options.write, "downstream", text)
    return 1 if any(map(fault, governed)) else 0


def run(checkouts: Path, *, governed: bool, only: list[str]) -> list[Answer]:
    """All cells in one process that has r3patch, or has it and does not let it patch anything."""
    answers = []
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", str(CELLS), str(checkouts), *only],
        env={**os.environ, "R3PATCH_DISABLE": str(int(not governed))},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            answers.append(json.loads(line))
            print(title(answers[-1]), words(answers[-1:]), file=sys.stderr)
    if process.returncode:
        raise SystemExit(f"{CELLS} ended with {process.returncode}")
    others = [a for a in kept(governed=governed) if only and a["framework"] not in only]
    ANSWERS.mkdir(parents=True, exist_ok=True)
    every = sorted([*others, *answers], key=lambda answer: str(answer["framework"]))
    _file(governed=governed).write_text("".join(json.dumps(a) + "\n" for a in every))
    return answers


def kept(*, governed: bool) -> list[Answer]:
    """The last answers of each framework."""
    file = _file(governed=governed)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _file(*, governed: bool) -> Path:
    return ANSWERS / ("with.jsonl" if governed else "without.jsonl")


def fault(answer: Answer) -> bool:
    """Whether r3patch has to answer for it: an error, an MTP call, a main call of a fair cell.

    A cell without an MTP call shows nothing, and counts as one.
    """
    if "absent" in answer:
        return False
    main = answer.get("main_wrong") and not answer["own_fault"]
    return bool("error" in answer or main or answer["mtp_bits"] or not answer["mtp"])


def title(answer: Answer) -> str:
    if "absent" in answer:
        return f"{answer['framework']}: no checkout called {' or '.join(answer['absent'])}"
    side = "with" if answer["governed"] else "without"
    return f"{_row(answer)[0]}, {answer['model']}, {_cut(answer)}, {side} r3patch:"


def _row(answer: Answer) -> tuple[str, str, str]:
    more = f" and its {'fork' if answer.get('fork') else 'patch'} of Megatron"
    commit = f"`{answer['commit']}`, {answer['date']}"
    fork = f"; {answer['fork']}" if answer.get("fork") else ""
    return answer["name"] + more * answer["patched"], commit + fork, answer["model"]


def _cut(answer: Answer) -> str:
    return f"PP{answer['pipeline']} {answer['recompute']}"


def table(without: list[Answer], governed: list[Answer]) -> str:
    """One row for each framework and model: plain and full recompute, PP1 and PP2 together."""
    cells = {_key(answer): answer for answer in governed}
    rows = ["| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS)]
    ran = [answer for answer in without if "absent" not in answer]
    for row in dict.fromkeys(map(_row, ran)):
        name, commit, model = row
        bare = [answer for answer in ran if _row(answer) == row]
        ours = [cells[_key(answer)] for answer in bare if _key(answer) in cells]
        head = f"| {name} | {commit} | {model} | {words(bare)} "
        rows.append(f"{head}| {_count(ours, 'main')} | {_count(ours, 'mtp')} |")
    when = max(_file(governed=True).stat().st_mtime, _file(governed=False).stat().st_mtime)
    return "\n".join([*rows, "", _made_by(ran, when)])


def _made_by(ran: list[Answer], when: float) -> str:
    date = datetime.datetime.fromtimestamp(when, datetime.timezone.utc).date()
    version = ran[0]["megatron"] if ran else metadata.version("megatron-core")
    return (
        f"`make downstream CHECKOUTS=folder`, {date}, megatron-core {version}, on a CPU: three "
        "microbatches, one MTP layer, plain and with full recompute, on one rank and on two "
        "pipeline stages where the framework's code takes MTP there; calls of all of these "
        "together. miles and slime are written for a Megatron of their own: stock Megatron enters "
        "no router into their lists."
    )


def _key(answer: Answer) -> tuple[Any, ...]:
    names = ("framework", "model", "recompute", "pipeline", "patched")
    return tuple(answer.get(name) for name in names)


def _count(answers: list[Answer], scope: str) -> str:
    ran = [answer for answer in answers if "error" not in answer]
    if len(ran) < len(answers) or not ran:
        return words(answers) if answers else "not run"
    wrong = sum(answer["main_wrong" if scope == "main" else "mtp_bits"] for answer in ran)
    total = sum(answer[scope] for answer in ran)
    why = {answer["own_fault"] for answer in ran} - {""} if wrong and scope == "main" else set()
    return f"{wrong} of {total}" + "".join(f": {text}" for text in why)


def words(answers: list[Answer]) -> str:
    """What came of cells that belong together."""
    kinds = Counter(_kind(answer) for answer in answers)
    parts = []
    for kind in kinds:
        same = [answer for answer in answers if _kind(answer) == kind]
        where = ", ".join(map(_cut, same)) + ": " if len(kinds) > 1 else ""
        parts.append(where + (_counts(same) if kind == "ran" else kind))
    return "; ".join(parts)


def _kind(answer: Answer) -> str:
    if "error" not in answer:
        return "ran" if "main" in answer else ""
    error = " ".join(answer["error"].split()).replace("|", "/")
    return f"raises `{error[:117] + '...' if len(error) > 120 else error}`"


def _counts(answers: list[Answer]) -> str:
    total: Counter[str] = Counter()
    for answer in answers:
        total.update({k: v for k, v in answer.items() if k.startswith(("main", "mtp"))})
    parts = list(_wrong(total))
    return f"in silence {' and '.join(parts)}" if parts else "every call right"


def _wrong(total: Counter[str]) -> Iterator[str]:
    if total["main_wrong"]:
        yield f"{total['main_wrong']} of {total['main']} main calls take other rows"
    if total["mtp_fed"]:
        yield f"{total['mtp_fed']} of {total['mtp']} MTP calls take rows of the rollout"
    others = total["mtp_other"] - total["mtp_fed"]
    if others:
        yield f"{others} of {total['mtp']} MTP calls take other experts"
    bits = total["mtp_bits"] - total["mtp_other"]
    if bits:
        yield f"{bits} of {total['mtp']} MTP calls differ from Megatron's own in bits"


if __name__ == "__main__":
    sys.exit(main())
