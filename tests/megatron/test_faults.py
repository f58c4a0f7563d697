"""benchmarks/faults.py, case by case: what the table of docs/faults.md says is what is told."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny import FULL

from r3patch import testing

pytestmark = pytest.mark.megatron

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    faults: ModuleType = importlib.import_module("faults")
finally:
    sys.path.remove(str(ROOT / "benchmarks"))


def page() -> dict[str, list[str]]:
    """The table's cells by fault: what tells, the agreement, the text."""
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    _, _, rest = text.partition(faults.BEGIN)
    lines = rest.partition(faults.END)[0].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: others for name, *others in cells}


@pytest.fixture(scope="module")
def world(request: pytest.FixtureRequest) -> Iterator[Any]:
    with testing.megatron_on_cpu():
        yield faults.World(**request.param)


def test_the_page_has_every_fault() -> None:
    """All fourteen, each told by tokens or by the alarm."""
    assert list(page()) == list(faults.FAULTS)
    assert len(faults.FAULTS) == 14
    assert {cells[0] for cells in page().values()} == {"tokens", "alarm", "tokens and alarm"}


@pytest.mark.foreign_routes
@pytest.mark.parametrize("world", [{}], indirect=True, ids=["no_recompute"])
@pytest.mark.parametrize("name", faults.FAULTS)
def test_a_fault_is_told_as_the_page_says(name: str, world: Any) -> None:
    """By the same one, and in the same words where tokens tell it."""
    verdict = faults.judge(world, faults.FAULTS[name])
    who, _, text = page()[name]
    assert verdict.who == who
    if "tokens" in who:
        assert verdict.tokens == text


@pytest.mark.parametrize("world", [{}, FULL], indirect=True, ids=["no_recompute", "full"])
@pytest.mark.parametrize("name", faults.HEALTHY)
def test_a_healthy_twin_is_silent(name: str, world: Any) -> None:
    """Both looked, and neither said anything."""
    verdict = faults.judge(world, faults.HEALTHY[name])
    assert verdict.silent, verdict
