"""A real vLLM as the oracle: what it sent (tests/data/engine) against stock Megatron's own routing.

tools/engine/rollout.py made the payloads, from checkpoints whose weights follow from their names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import oracle
import pytest
import torch

from r3patch import testing

pytestmark = pytest.mark.megatron

PAYLOADS = Path(__file__).parents[1] / "data/engine"
MODELS = ["qwen3_moe", "glm4_moe_lite"]
CASES = {
    "abort", "batch", "before the prefix is cached", "chunked prefill", "multi-turn", "n=2",
    "one-token prompt", "one-token response", "preemption", "prefix-cache hit", "prompt start",
    "prompt start at its end",
}  # fmt: skip

OFF_FOR_MLA = ["chunked prefill", "prefix-cache hit"]  # by vLLM, on a CPU
HTTP_CASES = {
    "batch", "chat", "multi-turn", "n=2", "one-token prompt", "prompt start", "stop string",
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for model_type in MODELS:
        checkpoints.write(directory, model_type)
    return directory


def rollout_of(model_type: str, dtype: str) -> oracle.Rollout:
    config = checkpoints.CONFIGS[model_type]
    return oracle.read(PAYLOADS / f"{model_type}_{dtype}.json", config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", MODELS)
def test_the_payloads_are_of_the_checkpoint(written: Path, model_type: str, dtype: str) -> None:
    """The weights are those that the engine had, and every case is there."""
    contents = rollout_of(model_type, dtype).contents
    assert contents["fingerprint"] == checkpoints.fingerprint(written / model_type)
    cases = {sample["case"] for sample in contents["samples"]}
    assert cases == CASES - set(contents.get("unable", ()))
    assert contents.get("unable", []) == (OFF_FOR_MLA if model_type == "glm4_moe_lite" else [])
    assert contents["preempted"] > 0


@pytest.mark.parametrize("model_type", MODELS)
def test_in_fp32_the_engine_and_megatron_are_one(written: Path, model_type: str) -> None:
    """No row differs, and the sampled tokens' log-probabilities are equal, replayed or not."""
    rollout = rollout_of(model_type, "float32")
    with testing.megatron_on_cpu():
        chunks = testing.load_hf(written / model_type, **rollout.overrides)
        found = oracle.compare(rollout, chunks)
    assert sum(found.routes.rows) > 2000
    assert sum(found.routes.rows_differing) == 0
    assert found.rows_replayed == sum(found.routes.rows)
    assert found.mtp_replayed == 0
    assert found.gap.max_abs < 1e-4
    assert found.gap_replayed.max_abs < 1e-4


@pytest.mark.parametrize("model_type", MODELS)
def test_in_bf16_replay_brings_the_policies_together(written: Path, model_type: str) -> None:
    """Rows differ between the engine and Megatron alone; with the engine's rows k3 shrinks."""
    rollout = rollout_of(model_type, "bfloat16")
    with testing.megatron_on_cpu():
        chunks = testing.load_hf(written / model_type, **rollout.overrides)
        found = oracle.compare(rollout, chunks)
    assert 0.002 < found.routes.mismatch < 0.2
    assert found.gap_replayed.k3 < found.gap.k3 / 2
    assert found.mtp_replayed == 0


@pytest.mark.parametrize("model_type", MODELS)
def test_replay_of_real_rows_trains_alike_under_recompute(written: Path, model_type: str) -> None:
    """In bf16: losses and gradients of full recompute are those without, to the bit."""
    rollout = rollout_of(model_type, "bfloat16")
    results = []
    with testing.megatron_on_cpu():
        for recompute in ({}, oracle.FULL_RECOMPUTE):
            overrides = {**rollout.overrides, **recompute}
            chunks = testing.load_hf(written / model_type, **overrides)
            results.append((oracle.train(rollout, chunks), gradients(chunks[0])))
    (plain, want), (recomputed, got) = results
    assert recomputed.recompute_calls > 0
    assert recomputed.rows_differing_in_recompute == 0
    assert recomputed.mtp_replayed == 0
    assert plain.losses == recomputed.losses
    assert want.keys() == got.keys()
    assert not [name for name in want if not torch.equal(want[name], got[name])]


def test_whole_responses_over_http_are_the_models_own(written: Path) -> None:
    """A choice as it came, completion and chat: no row differs, nor any log-probability."""
    file = PAYLOADS / "qwen3_moe_http.json"
    rollout, checkpoint = oracle.read_for(file, written)
    assert rollout.contents["fingerprint"] == checkpoints.fingerprint(checkpoint)
    assert {sample["case"] for sample in rollout.contents["samples"]} == HTTP_CASES
    with testing.megatron_on_cpu():
        found = oracle.compare(rollout, testing.load_hf(checkpoint, **rollout.overrides))
    assert sum(found.routes.rows) > 500
    assert sum(found.routes.rows_differing) == 0
    assert found.gap.max_abs < 1e-4


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
