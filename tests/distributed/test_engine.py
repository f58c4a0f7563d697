"""Rows of a real vLLM on two ranks."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import oracle
import pytest

from r3patch import testing

pytestmark = [pytest.mark.megatron, pytest.mark.distributed, pytest.mark.slow]

FILE = Path(__file__).parents[1] / "data/engine/glm4_moe_lite_float32.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    checkpoints.write(directory, "glm4_moe_lite")
    return directory


@pytest.fixture(scope="module")
def alone(written: Path) -> oracle.Trained:
    """What one process finds."""
    with testing.megatron_on_cpu():
        rollout, checkpoint = oracle.read_for(FILE, written)
        chunks = testing.load_hf(checkpoint, **rollout.overrides)
        return oracle.train(rollout, chunks)


@pytest.mark.parametrize("cut", [{"pipeline": 2}, {"tensor": 2}], ids=["pp2", "tp2_sp"])
def test_the_engines_rows_are_the_routers_own_on_two_ranks(
    written: Path, alone: oracle.Trained, cut: dict[str, int]
) -> None:
    """In fp32, full recompute: no row differs, MTP has none, losses are those of one process."""
    oracle.assert_on_two_ranks([FILE], written, cut, [alone])
