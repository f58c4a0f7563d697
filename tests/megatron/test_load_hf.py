"""testing.load_hf: what transformers computes, or a refusal that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoint import log_probs, mtp_log_probs
from oracle import batch

import r3patch
from r3patch import testing

pytestmark = pytest.mark.megatron

EXPECTED = json.loads((Path(__file__).parents[1] / "data/hf/expected.json").read_text())
TOKENS = torch.tensor(EXPECTED["tokens"])
WITH_MTP = ["glm4_moe", "glm4_moe_lite"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for model_type in checkpoints.CONFIGS:
        checkpoints.write(directory, model_type)
    return directory


def load(checkpoint: Path, **overrides: Any) -> Any:
    (model,) = testing.load_hf(checkpoint, **overrides)
    return model.eval()


@pytest.mark.parametrize("model_type", checkpoints.CONFIGS)
def test_the_log_probabilities_are_those_of_transformers(written: Path, model_type: str) -> None:
    """Of the main model, for every token of two samples."""
    expected = EXPECTED["models"][model_type]
    assert checkpoints.fingerprint(written / model_type) == expected["fingerprint"]
    with testing.megatron_on_cpu():
        got = log_probs(load(written / model_type), TOKENS)
    torch.testing.assert_close(got, torch.tensor(expected["main"]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", WITH_MTP)
def test_the_mtp_layer_is_the_checkpoints(written: Path, model_type: str) -> None:
    """Its log-probabilities are those of transformers' layer between the head's own operations."""
    with testing.megatron_on_cpu():
        got = mtp_log_probs(load(written / model_type), TOKENS)
    expected = torch.tensor(EXPECTED["models"][model_type]["mtp"])
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_a_checkpoint_without_mtp_gets_a_seeded_head(written: Path) -> None:
    """It trains, and the main model computes what it did."""
    with testing.megatron_on_cpu():
        model = load(written / "qwen3_moe", mtp_num_layers=1)
        scopes = [router.scope for router in r3patch.routers(model)]
        assert scopes == ["main"] * 4 + ["mtp"]
        got = log_probs(model, TOKENS)
        testing.train_step([model.train()], [batch(TOKENS)])
        gradients = [p.grad for n, p in model.named_parameters() if n.startswith("mtp.")]
    expected = torch.tensor(EXPECTED["models"]["qwen3_moe"]["main"])
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert any(g is not None and bool(g.any()) for g in gradients)


def test_the_mtp_layer_can_be_left_out(written: Path) -> None:
    """mtp_num_layers=None builds the decoder alone."""
    with testing.megatron_on_cpu():
        model = load(written / "glm4_moe", mtp_num_layers=None)
        assert {router.scope for router in r3patch.routers(model)} == {"main"}


def test_bf16_is_a_matter_of_the_config(written: Path) -> None:
    """The weights are the checkpoint's to the bit, and the log-probabilities near those of fp32."""
    bf16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    with testing.megatron_on_cpu():
        wide, narrow = load(written / "qwen3_moe"), load(written / "qwen3_moe", **bf16)
        for (name, a), (_, b) in zip(
            wide.named_parameters(), narrow.named_parameters(), strict=True
        ):
            assert b.dtype == torch.bfloat16
            assert torch.equal(a, b.float()), name
        assert (log_probs(narrow, TOKENS) - log_probs(wide, TOKENS)).abs().mean() < 0.1


def changed(**config: Any) -> Callable[[Any, Any], None]:
    return lambda tensors, fields: fields.update(config)


def other_head(tensors: dict[str, torch.Tensor], config: Any) -> None:
    tensors["model.layers.4.shared_head.head.weight"] = tensors["lm_head.weight"] + 1


FAULTS: dict[str, tuple[str, Callable[[Any, Any], Any], str]] = {
    "a tensor is missing": (
        "qwen3_moe",
        lambda tensors, _: tensors.pop("model.layers.2.mlp.experts.3.up_proj.weight"),
        r"has not: model\.layers\.2\.mlp\.experts\.3\.up_proj\.weight$",
    ),
    "tensors without a place": (
        "qwen3_moe",
        lambda tensors, _: tensors.update({f"visual.{n}.weight": torch.ones(2) for n in "ab"}),
        r"nothing takes: visual\.a\.weight and 1 more$",
    ),
    "MTP has a head of its own": (
        "glm4_moe",
        other_head,
        r"differs from what the model shares: model\.layers\.4\.shared_head\.head\.weight$",
    ),
    "another number of experts": (
        "qwen3_moe",
        changed(num_experts=15),
        r"nothing takes: model\.layers\.0\.mlp\.experts\.15\.down_proj\.weight and 11 more",
    ),
    "another size": (
        "glm4_moe",
        changed(moe_intermediate_size=8),
        r"gate_proj\.weight \+ .*up_proj\.weight is \[32, 32\], expected \[16, 32\] for decoder",
    ),
    "another kind of model": (
        "qwen3_moe",
        changed(model_type="gpt_oss"),
        "model_type 'gpt_oss', expected qwen3_moe, glm4_moe, glm4_moe_lite",
    ),
    "a scaled rotary embedding": (
        "glm4_moe_lite",
        changed(rope_scaling={"rope_type": "yarn", "factor": 4}),
        "with rope_type='yarn', expected 'default'",
    ),
    "shared embeddings": (
        "qwen3_moe",
        changed(tie_word_embeddings=True),
        "with tie_word_embeddings=True, expected False",
    ),
    "gate weights that do not sum to one": (
        "glm4_moe",
        changed(norm_topk_prob=False),
        "with norm_topk_prob=False, expected True",
    ),
    "groups that Megatron scores otherwise": (
        "glm4_moe",
        changed(n_group=4, topk_group=4),
        "num_experts_per_tok=4 and topk_group=4",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_it_does_not_know_is_refused(written: Path, tmp_path: Path, fault: str) -> None:
    """By the name of the tensor or of the setting."""
    from safetensors.torch import load_file, save_file

    model_type, damage, message = FAULTS[fault]
    tensors = load_file(written / model_type / "model.safetensors")
    config = json.loads((written / model_type / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with testing.megatron_on_cpu(), pytest.raises(r3patch.R3PatchError, match=message):
        testing.load_hf(tmp_path)


def test_an_override_that_adds_parameters_is_refused(written: Path) -> None:
    """The message says which parameter, and which overrides there were."""
    with (
        testing.megatron_on_cpu(),
        pytest.raises(r3patch.R3PatchError, match=r"linear_qkv\.bias.*overrides.*add_qkv_bias"),
    ):
        testing.load_hf(written / "qwen3_moe", add_qkv_bias=True)


def test_group_limited_routing_is_loaded(written: Path, tmp_path: Path) -> None:
    """Two experts from each of two of four groups, in every row."""
    path = checkpoints.write(tmp_path, "glm4_moe", n_group=4, topk_group=2)
    with testing.megatron_on_cpu():
        model = load(path)
        calls = testing.RoutingCalls(model)
        log_probs(model, TOKENS)
    groups = torch.cat([call.routing_map for call in calls]).unflatten(1, (4, 4)).sum(-1)
    assert int((groups > 0).sum(-1).max()) == 2
