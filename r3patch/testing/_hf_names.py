"""Where the parameters of Megatron's whole model stand in a Hugging Face checkpoint.

Source: the parameters of GPTModel as `r3patch.testing` builds it (local layer specs of
models/gpt/gpt_layer_specs.py, 0.16.1 and 0.19.2), and the checkpoints of Qwen3-MoE, GLM-4.5 and
GLM-4.7-Flash on the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch


class Source(NamedTuple):
    """The tensors of the checkpoint that make one of Megatron's, and how."""

    names: tuple[str, ...]
    join: Callable[[list[torch.Tensor]], torch.Tensor] = torch.cat


class Names(NamedTuple):
    """What a checkpoint of this config has."""

    sources: dict[str, Source]  # by Megatron's name
    copies: dict[str, str]  # tensors that are stored twice: the copy, and what it is a copy of


_MLA = {
    "linear_q_down_proj": "q_a_proj",
    "q_layernorm": "q_a_layernorm",
    "linear_q_up_proj": "q_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "kv_layernorm": "kv_a_layernorm",
    "linear_kv_up_proj": "kv_b_proj",
}


def checkpoint_names(config: Mapping[str, Any], fields: Mapping[str, Any]) -> Names:
    """Every tensor of the whole model.

    Args:
        config: of Hugging Face: its MTP layers are numbered behind the decoder's.
        fields: of Megatron's config, as they follow from it.
    """
    sources = {
        "embedding.word_embeddings.weight": Source(("model.embed_tokens.weight",)),
        "decoder.final_layernorm.weight": Source(("model.norm.weight",)),
        "output_layer.weight": Source(("lm_head.weight",)),
    }
    copies = {}
    for index, is_moe in enumerate(fields["moe_layer_freq"]):
        for name, source in _layer(f"model.layers.{index}.", fields, is_moe=bool(is_moe)).items():
            sources[f"decoder.layer{index + 1}.{name}"] = source
    for depth in range(config.get("num_nextn_predict_layers") or 0):
        theirs, ours = f"model.layers.{fields['num_layers'] + depth}.", f"mtp.layers.{depth}."
        for name, source in _layer(theirs, fields, is_moe=True).items():
            sources[f"{ours}layer.{name}"] = source
        for name in ("enorm", "hnorm", "eh_proj"):
            sources[f"{ours}{name}.weight"] = Source((f"{theirs}{name}.weight",))
        sources[f"{ours}final_layernorm.weight"] = Source((f"{theirs}shared_head.norm.weight",))
        # Megatron's MTP shares both with the model.
        copies[f"{theirs}embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"{theirs}shared_head.head.weight"] = "lm_head.weight"
    return Names(sources, copies)


def _layer(prefix: str, fields: Mapping[str, Any], *, is_moe: bool) -> dict[str, Source]:
    names = {
        "input_layernorm.weight": Source(("input_layernorm.weight",)),
        "pre_mlp_layernorm.weight": Source(("post_attention_layernorm.weight",)),
        **_attention(fields),
        **(_experts(fields) if is_moe else _gated_mlp("mlp.", "mlp.")),
    }
    return {
        ours: source._replace(names=tuple(prefix + name for name in source.names))
        for ours, source in names.items()
    }


def _attention(fields: Mapping[str, Any]) -> dict[str, Source]:
    ours, theirs = "self_attention.", "self_attn."
    found = {f"{ours}linear_proj.weight": Source((f"{theirs}o_proj.weight",))}
    if fields.get("multi_latent_attention"):
        for name, name_there in _MLA.items():
            found[f"{ours}{name}.weight"] = Source((f"{theirs}{name_there}.weight",))
        return found
    groups = fields["num_query_groups"]
    for kind in ("weight", "bias") if fields["add_qkv_bias"] else ("weight",):
        found[f"{ours}linear_qkv.{kind}"] = Source(
            tuple(f"{theirs}{part}_proj.{kind}" for part in "qkv"),
            lambda parts: _interleave(parts, groups),
        )
    if fields["qk_layernorm"]:
        for part in "qk":
            found[f"{ours}{part}_layernorm.weight"] = Source((f"{theirs}{part}_norm.weight",))
    return found


def _interleave(parts: list[torch.Tensor], groups: int) -> torch.Tensor:
    """Megatron's order: for each query group its queries, its key, its value."""
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def _gated_mlp(ours: str, theirs: str) -> dict[str, Source]:
    return {
        f"{ours}linear_fc1.weight": Source(
            (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
        ),
        f"{ours}linear_fc2.weight": Source((f"{theirs}down_proj.weight",)),
    }


def _experts(fields: Mapping[str, Any]) -> dict[str, Source]:
    found = {"mlp.router.weight": Source(("mlp.gate.weight",))}
    if fields.get("moe_router_enable_expert_bias"):
        found["mlp.router.expert_bias"] = Source(("mlp.gate.e_score_correction_bias",))
    if fields.get("moe_shared_expert_intermediate_size"):
        found |= _gated_mlp("mlp.shared_experts.", "mlp.shared_experts.")
    for expert in range(fields["num_moe_experts"]):
        found |= _gated_mlp(f"mlp.experts.experts.{expert}.", f"mlp.experts.{expert}.")
    return found
