"""Rows of a real vLLM on two ranks."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import oracle
import pytest

from r3patch import testing

pytestmark = [pytest.mark.megatron, pytest.mark.distributed, pytest.mark.slow]

PAYLOADS = Path(__file__).parents[1] / "data/engine"
FILES = [PAYLOADS / f"{name}_float32.json" for name in ("qwen3_moe", "glm4_moe_lite")]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for model_type in ("qwen3_moe", "glm4_moe_lite"):
        checkpoints.write(directory, model_type)
    return directory


@pytest.fixture(scope="module")
def alone(written: Path) -> list[oracle.Trained]:
    """What one process finds."""
    found = []
    with testing.megatron_on_cpu():
        for file in FILES:
            rollout, checkpoint = oracle.read_for(file, written)
            chunks = testing.load_hf(checkpoint, **rollout.overrides)
            found.append(oracle.train(rollout, chunks))
    return found


@pytest.mark.parametrize("cut", [{"pipeline": 2}, {"tensor": 2}], ids=["pp2", "tp2_sp"])
def test_the_engines_rows_are_the_routers_own_on_two_ranks(
    written: Path, alone: list[oracle.Trained], cut: dict[str, int]
) -> None:
    """In fp32, full recompute: no row differs, MTP has none, losses are those of one process."""
    oracle.assert_on_two_ranks(FILES, written, cut, alone)
