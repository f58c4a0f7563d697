"""What the frameworks' replay code does to a model with MTP, once r3patch is imported."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.megatron, pytest.mark.slow]

HERE = Path(__file__).parent
FRAMEWORKS = sorted(path.stem for path in (HERE / "drivers").glob("*.py"))


@pytest.fixture(scope="module")
def downstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """tools/downstream.py, which keeps its answers elsewhere here."""
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("downstream")
        patch.setattr(module, "ANSWERS", tmp_path_factory.mktemp("downstream"))
        yield module


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_with_r3patch(framework: str, checkouts: Path, downstream: Any) -> None:
    """Main calls use the rollout's rows, MTP calls are Megatron's own to the bit."""
    found = downstream.run(checkouts, governed=True, only=[framework])
    answers = [answer for answer in found if "absent" not in answer]
    if not answers:
        pytest.skip(f"no clone of {framework}")
    faults = [answer for answer in answers if downstream.fault(answer)]
    assert not faults
    assert all(answer["main"] and answer["mtp"] for answer in answers)
