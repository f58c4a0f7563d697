"""Tiny models of the shapes that R3 is used on, each with MTP, built from stock Megatron."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch

from r3patch._errors import UnsupportedMegatronError
from r3patch.testing._attention import use_cpu_attention

VOCABULARY = 256

_COMMON: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "moe_ffn_hidden_size": 16,
    "moe_layer_freq": [0, 1, 1],
    "mtp_num_layers": 1,
    "mtp_loss_scaling_factor": 0.1,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "allgather",
    "moe_grouped_gemm": False,
    "use_cpu_initialization": True,
    "batch_p2p_sync": False,
    "deallocate_pipeline_outputs": False,
    "pipeline_dtype": torch.float32,
}

_SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 1e-3,
}

_MLA = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 8,
    "rope_type": "rope",
}

#: The router settings of the models, as their configs publish them; sizes are tiny.
SHAPES: dict[str, dict[str, Any]] = {
    "glm47_flash": {
        **_SIGMOID,
        **_MLA,
        "num_moe_experts": 64,
        "moe_router_topk": 4,
        "moe_router_topk_scaling_factor": 1.8,
        "moe_shared_expert_intermediate_size": 16,
    },
    "qwen3_moe": {
        "num_moe_experts": 128,
        "moe_router_topk": 8,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": False,
        "moe_layer_freq": [1, 1, 1],
        "num_query_groups": 2,
    },
    "deepseek_v3": {
        **_SIGMOID,
        **_MLA,
        "num_moe_experts": 32,
        "moe_router_topk": 8,
        "moe_router_num_groups": 8,
        "moe_router_group_topk": 4,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_shared_expert_intermediate_size": 16,
    },
    "nemotron_hybrid": {
        **_SIGMOID,
        "num_moe_experts": 16,
        "moe_router_topk": 4,
        "moe_layer_freq": 1,
    },
}

#: Attention (*) and MoE (E) layers; after the slash the pattern of one MTP depth.
HYBRID_PATTERN = "*E*E/*E"


def tiny_config(shape: str = "glm47_flash", **overrides: Any) -> Any:
    """A ``TransformerConfig`` of one of `SHAPES`, for the parallel sizes that are set up.

    Args:
        shape: a key of `SHAPES`.
        overrides: fields of the config.
    """
    return make_config(_fields(shape, overrides))


def _fields(shape: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The shape's fields and the caller's own, by which its attention may be plain."""
    published = SHAPES[shape]
    if not overrides.get("multi_latent_attention", True):  # the config of plain attention lacks it
        published = {name: value for name, value in published.items() if name not in _MLA}
    return {**published, **overrides}


def make_config(own: dict[str, Any]) -> Any:
    """A ``TransformerConfig`` of what the tiny models have in common, and these fields."""
    from megatron.core import parallel_state
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    fields = {**_COMMON, **own}
    num_layers, frequency = fields["num_layers"], fields["moe_layer_freq"]
    if isinstance(frequency, list) and len(frequency) != num_layers:
        fields["moe_layer_freq"] = (frequency + [1] * num_layers)[:num_layers]
    if fields["num_moe_experts"] is None:  # a dense model: Megatron refuses MoE settings there
        fields = {name: value for name, value in fields.items() if not name.startswith("moe_")}
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    fields = {
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": tensor > 1,
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": virtual,
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        # With two stages a batch of sends and receives would cross, so Megatron's arguments ask
        # for overlap with virtual stages (megatron/training/arguments.py).
        "overlap_p2p_comm": virtual is not None,
        "batch_p2p_comm": virtual is None,
        **fields,
    }
    mla = fields.get("multi_latent_attention", False)
    return (MLATransformerConfig if mla else TransformerConfig)(**fields)


class Sizes(NamedTuple):
    """What the constructor of a model takes and `TransformerConfig` has not."""

    vocab_size: int
    max_sequence_length: int
    rotary_base: float
    rotary_percent: float


def tiny_model(
    shape: str = "glm47_flash",
    *,
    vocab_size: int = VOCABULARY,
    max_sequence_length: int = 512,
    rotary_base: float = 10000.0,
    rotary_percent: float = 1.0,
    **overrides: Any,
) -> list[torch.nn.Module]:
    """The chunks of this rank: one, or as many as there are virtual pipeline stages.

    Args:
        shape: a key of `SHAPES`.
        vocab_size: tokens of the embedding and of the output layer.
        max_sequence_length: the longest sequence that the model takes.
        rotary_base: of the rotary embedding, theta elsewhere.
        rotary_percent: the part of a head that is rotated, above 0 and at most 1.
        overrides: fields of the config.

    Raises:
        UnsupportedMegatronError: the installed Megatron cannot build the shape.
    """
    sizes = Sizes(vocab_size, max_sequence_length, rotary_base, rotary_percent)
    return build_model(_fields(shape, overrides), sizes, hybrid=shape == "nemotron_hybrid")


def build_model(
    fields: dict[str, Any], sizes: Sizes, *, hybrid: bool = False
) -> list[torch.nn.Module]:
    """The chunks of this rank of the model with these fields of the config."""
    from megatron.core.enums import ModelType

    if hybrid:
        chunks = [_hybrid(fields, sizes)]
    else:
        if fields.get("multi_latent_attention"):  # it rotates by the config, not by the model
            rotary = {name: getattr(sizes, name) for name in ("rotary_base", "rotary_percent")}
            fields = {**rotary, **fields}
        config = make_config(fields)
        stages = config.virtual_pipeline_model_parallel_size
        chunks = [_gpt(config, sizes, stage) for stage in (range(stages) if stages else [None])]
    for chunk in chunks:
        chunk.model_type = ModelType.encoder_or_decoder
    return chunks


def _gpt(config: Any, sizes: Sizes, vp_stage: int | None) -> torch.nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_mtp_block_spec,
    )

    rank, size = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    last_stage = (config.virtual_pipeline_model_parallel_size or 1) - 1
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=vp_stage)
    use_cpu_attention(config, spec)
    mtp_spec = None
    if config.mtp_num_layers:
        mtp_spec = get_gpt_mtp_block_spec(
            config, _last_layer(config, spec), use_transformer_engine=False, vp_stage=vp_stage
        )
    model: torch.nn.Module = GPTModel(
        config,
        spec,
        **sizes._asdict(),
        pre_process=rank == 0 and not vp_stage,
        post_process=rank == size - 1 and (vp_stage or 0) == last_stage,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        mtp_block_spec=mtp_spec,
        vp_stage=vp_stage,
    )
    return model


def _last_layer(config: Any, spec: Any) -> Any:
    """What the MTP spec copies its layer from: a stage without decoder layers has none to give."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs

    if spec.layer_specs:
        return spec
    layer = get_gpt_decoder_layer_specs(config, use_transformer_engine=False)[-1]
    use_cpu_attention(config, layer)
    return layer


def _hybrid(fields: dict[str, Any], sizes: Sizes) -> torch.nn.Module:
    """A hybrid stack of attention (*) and MoE (E) layers, in the decoder and in MTP."""
    try:
        from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
        from megatron.core.models.hybrid.hybrid_model import HybridModel
    except ImportError as error:
        raise UnsupportedMegatronError(
            f"nemotron_hybrid needs megatron.core.models.hybrid.hybrid_model ({error}): "
            "megatron-core 0.18 and newer have it."
        ) from error
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer.spec_utils import ModuleSpec

    main = HYBRID_PATTERN.partition("/")[0]
    fields = {"num_layers": len(main), **fields}
    frequency = [int(symbol == "E") for symbol in main]
    config = make_config(fields)
    config.hybrid_layer_pattern = HYBRID_PATTERN  # as Megatron's arguments have it
    # The layer specs of a GPT block whose first layer is dense and whose second is MoE.
    like = make_config({**fields, "moe_layer_freq": frequency})
    spec = get_gpt_decoder_block_spec(like, use_transformer_engine=False)
    use_cpu_attention(config, spec)
    attention, moe = (copy.deepcopy(layer) for layer in spec.layer_specs[:2])
    _only(attention, attention=True)
    _only(moe, attention=False)
    submodules = HybridStackSubmodules(
        attention_layer=attention,
        moe_layer=moe,
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False),
    )
    model: torch.nn.Module = HybridModel(
        config,
        ModuleSpec(module=HybridStack, submodules=submodules),
        **sizes._asdict(),
        hybrid_layer_pattern=HYBRID_PATTERN,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    return model


def _only(layer: Any, *, attention: bool) -> None:
    """Leave one half of a transformer layer: a hybrid stack has each half as a layer."""
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp

    parts = layer.submodules
    if attention:
        parts.mlp, parts.mlp_bda, parts.pre_mlp_layernorm = IdentityOp, IdentityFuncOp, IdentityOp
    else:
        parts.self_attention, parts.self_attn_bda = IdentityOp, IdentityFuncOp
        parts.input_layernorm = IdentityOp
