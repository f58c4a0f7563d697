"""Tiny Hugging Face checkpoints of random weights, in the form in which the hub has the real ones.

    python tools/engine/checkpoints.py DIRECTORY    # torch and safetensors are enough

Weights follow from their names alone and are whole bfloat16 numbers, so that every machine makes
the same ones and an engine has the same ones in fp32 and in bf16. Sizes are such that a wrong map
shows: more query heads than groups, norms that are not one, expert biases that decide, a part of a
head rotated, a dense first layer.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Shapes = Iterator[tuple[str, tuple[int, ...]]]

_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,  # of the norms inside MLA too, where transformers takes no other
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "torch_dtype": "bfloat16",
}
_GLM: dict[str, Any] = {
    **_COMMON,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **_COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 16,
        "head_dim": 32,  # the smallest that vLLM's attention on a CPU takes
        "num_key_value_heads": 2,
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "glm4_moe": {  # GLM-4.5
        **_GLM,
        "architectures": ["Glm4MoeForCausalLM"],
        "head_dim": 32,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
    },
    "glm4_moe_lite": {  # GLM-4.7-Flash: the ranks 512 and 64 are its own, and all that vLLM's
        **_GLM,  # MLA on a CPU takes
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 24,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 64,
        "v_head_dim": 16,
        "attention_bias": False,
    },
}


def write(directory: Path, model_type: str, **changes: Any) -> Path:
    """Write one checkpoint to ``directory / model_type`` and return that.

    Args:
        directory: where checkpoints go.
        model_type: a key of `CONFIGS`.
        changes: fields of the config.
    """
    config = {"model_type": model_type, **CONFIGS[model_type], **changes}
    target = directory / model_type
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: values(name, shape) for name, shape in shapes(config)}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def fingerprint(checkpoint: Path) -> str:
    """Of the weights: payloads belong to these."""
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:16]


def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    name = name.rpartition("embed_tokens")[1] or name  # an MTP layer has the model's once more,
    name = "lm_head" if "shared_head.head" in name or "lm_head" in name else name  # and this
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        noise = 1 + noise * 0.1
    elif name.endswith("bias"):
        noise = noise * 0.1
    else:  # a larger head, so that some tokens are likely
        noise = noise * (2 if name == "lm_head" else 1) * shape[-1] ** -0.5
    whole = noise.to(torch.bfloat16)
    return whole.float() if name.endswith("correction_bias") else whole


def shapes(config: dict[str, Any]) -> Shapes:
    """Every tensor of a checkpoint, by name."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)
    decoder, mtp = config["num_hidden_layers"], config.get("num_nextn_predict_layers", 0)
    for number in range(decoder + mtp):
        prefix = f"model.layers.{number}."
        is_dense = number < config.get("first_k_dense_replace", 0)
        for name, shape in _layer(config, is_dense=is_dense):
            yield prefix + name, shape
    for number in range(decoder, decoder + mtp):
        prefix = f"model.layers.{number}."
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            yield f"{prefix}{norm}.weight", (hidden,)
        yield f"{prefix}eh_proj.weight", (hidden, 2 * hidden)
        for copy in ("embed_tokens", "shared_head.head"):
            yield f"{prefix}{copy}.weight", (vocabulary, hidden)


def _layer(config: dict[str, Any], *, is_dense: bool) -> Shapes:
    hidden = config["hidden_size"]
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    yield from _mla(config) if "kv_lora_rank" in config else _attention(config)
    if is_dense:
        yield from _mlp("mlp.", hidden, config["intermediate_size"])
        return
    experts = config.get("num_experts") or config["n_routed_experts"]
    yield "mlp.gate.weight", (experts, hidden)
    if "n_shared_experts" in config:
        yield "mlp.gate.e_score_correction_bias", (experts,)
        shared = config["n_shared_experts"] * config["moe_intermediate_size"]
        yield from _mlp("mlp.shared_experts.", hidden, shared)
    for expert in range(experts):
        yield from _mlp(f"mlp.experts.{expert}.", hidden, config["moe_intermediate_size"])


def _attention(config: dict[str, Any]) -> Shapes:
    hidden, width = config["hidden_size"], config["head_dim"]
    queries, groups = config["num_attention_heads"], config["num_key_value_heads"]
    for part, heads in (("q", queries), ("k", groups), ("v", groups)):
        yield f"self_attn.{part}_proj.weight", (heads * width, hidden)
        if config["attention_bias"]:
            yield f"self_attn.{part}_proj.bias", (heads * width,)
    yield "self_attn.o_proj.weight", (hidden, queries * width)
    for part in "qk":
        yield f"self_attn.{part}_norm.weight", (width,)


def _mla(config: dict[str, Any]) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    query, latent = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rotary, width = (
        config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    yield "self_attn.q_a_proj.weight", (query, hidden)
    yield "self_attn.q_a_layernorm.weight", (query,)
    yield "self_attn.q_b_proj.weight", (heads * (nope + rotary), query)
    yield "self_attn.kv_a_proj_with_mqa.weight", (latent + rotary, hidden)
    yield "self_attn.kv_a_layernorm.weight", (latent,)
    yield "self_attn.kv_b_proj.weight", (heads * (nope + width), latent)
    yield "self_attn.o_proj.weight", (hidden, heads * width)


def _mlp(prefix: str, hidden: int, width: int) -> Shapes:
    yield f"{prefix}gate_proj.weight", (width, hidden)
    yield f"{prefix}up_proj.weight", (width, hidden)
    yield f"{prefix}down_proj.weight", (hidden, width)


if __name__ == "__main__":
    for model_type in CONFIGS:
        print(write(Path(sys.argv[1]), model_type))
