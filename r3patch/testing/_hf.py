"""A Hugging Face MoE checkpoint in stock Megatron, exactly or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from r3patch._errors import R3PatchError
from r3patch._layers import moe_layers
from r3patch.testing._hf_names import Names, checkpoint_names
from r3patch.testing._models import Sizes, build_model
from r3patch.testing._parallel import fill_parameters, seed_parameters


def load_hf(path: str | os.PathLike[str], **overrides: Any) -> list[torch.nn.Module]:
    """The chunks of this rank of a Hugging Face checkpoint, weights in place.

    Knows ``qwen3_moe``, ``glm4_moe`` (GLM-4.5) and ``glm4_moe_lite`` (GLM-4.7-Flash), MTP layers
    included, whatever the parallel sizes. It is made for checkpoints that a CPU runs.

    Args:
        path: a directory with ``config.json`` and ``*.safetensors``, as the hub has them.
        overrides: fields of Megatron's config: ``bf16=True, params_dtype=torch.bfloat16``,
            recompute. With ``mtp_num_layers`` larger than what the checkpoint has, further depths
            get the weights of `seed_parameters`; with a smaller one they are left out.

    Raises:
        R3PatchError: safetensors is not installed; the model is of another kind, or has a setting
            that stock Megatron or this function does not know; tensors of the checkpoint are
            missing, have another shape, or have no place in the model.
    """
    directory = Path(path)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    fields, sizes = megatron_fields(config)
    names = checkpoint_names(config, fields)
    checkpoint = _Checkpoint(directory)
    checkpoint.check(names)
    chunks = build_model({**fields, **overrides}, sizes)
    seed_parameters(chunks)
    in_checkpoint = config.get("num_nextn_predict_layers") or 0

    def values(name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        # The layer inside an MTP layer has another name since 0.17.
        name = re.sub(r"^(mtp\.layers\.\d+)\.(transformer|mtp_model)_layer\.", r"\1.layer.", name)
        source = names.sources.get(name)
        if source is None:
            depth = re.match(r"mtp\.layers\.(\d+)\.", name)
            if depth and int(depth.group(1)) >= in_checkpoint:
                return None
            raise R3PatchError(
                f"{path}: the model has {name} {list(shape)}, and the checkpoint nothing for it. "
                f"Which of the overrides asks for it: {', '.join(overrides) or 'none'}?"
            )
        whole = source.join([checkpoint.read(part) for part in source.names])
        if tuple(whole.shape) != shape:
            raise R3PatchError(
                f"{path}: {' + '.join(source.names)} is {list(whole.shape)}, expected "
                f"{list(shape)} for {name}. The config is of another model, or an override is."
            )
        return whole

    fill_parameters(chunks, values)
    return chunks


class _Checkpoint:
    """The tensors of a directory by name, read when they are asked for."""

    def __init__(self, directory: Path) -> None:
        try:
            import safetensors
        except ImportError as error:
            raise R3PatchError(
                "load_hf needs safetensors: pip install '.[rollout]' in a checkout of r3patch."
            ) from error
        self.directory = directory
        self.files: dict[str, Any] = {}
        for path in sorted(directory.glob("*.safetensors")):
            file: Any = safetensors.safe_open(path, framework="pt")
            self.files |= dict.fromkeys(file.keys(), file)

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.files[name].get_tensor(name)
        return tensor

    def check(self, names: Names) -> None:
        """That every tensor is there and has a place, in the whole model rather than this rank."""
        wanted = {name for source in names.sources.values() for name in source.names}
        present = set(self.files)
        copies = present & names.copies.keys()
        faults = {
            "has not": wanted - present,
            "has, and nothing takes": present - wanted - copies,
            "has, and differs from what the model shares": {
                name
                for name in copies & present
                if not torch.equal(self.read(name), self.read(names.copies[name]))
            },
        }
        said = [f"it {fault}: {_some(found)}" for fault, found in faults.items() if found]
        if said:
            raise R3PatchError(
                f"{self.directory} is no checkpoint of the model in its config: {'; '.join(said)}"
            )


def _some(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    return f"{first} and {len(rest)} more" if rest else first


def megatron_fields(config: Mapping[str, Any]) -> tuple[dict[str, Any], Sizes]:
    """What Megatron's config and model are given for a ``config.json``.

    Raises:
        R3PatchError: see `load_hf`.
    """
    kind = config.get("model_type")
    if kind not in _KINDS:
        raise R3PatchError(
            f"load_hf got a checkpoint of model_type {kind!r}, expected {', '.join(_KINDS)}."
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    _refuse(kind, {"rope_type": "default"}, {"rope_type": rope.get("rope_type", "default")})
    _refuse(kind, _EXPECTED, config)
    num_layers = config["num_hidden_layers"]
    with_router = moe_layers(config)
    fields = {
        "num_layers": num_layers,
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "moe_layer_freq": [int(number in with_router) for number in range(1, num_layers + 1)],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_topk": config["num_experts_per_tok"],
        "mtp_num_layers": config.get("num_nextn_predict_layers") or None,
        **_KINDS[kind](config),
    }
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part is None:
        part = 0.5 if kind == "glm4_moe" else 1.0  # as transformers has it
    sizes = Sizes(
        vocab_size=config["vocab_size"],
        max_sequence_length=config["max_position_embeddings"],
        rotary_base=float(rope["rope_theta"] if "rope_theta" in rope else config["rope_theta"]),
        rotary_percent=part,
    )
    return fields, sizes


#: What stock Megatron does, or this module knows. A field that is absent or null is fine.
_EXPECTED = {
    "hidden_act": "silu",
    "quantization_config": None,
    "rope_interleave": True,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}


def _refuse(kind: str, expected: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if config.get(name) is not None and config[name] != value:
            raise R3PatchError(
                f"load_hf does not know {kind} with {name}={config[name]!r}, expected {value!r}."
            )


def _qwen3_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_plain_attention(config),
        "qk_layernorm": True,
        "num_moe_experts": config.get("num_experts") or config["num_local_experts"],
        "moe_router_score_function": "softmax",
        # Softmax of the chosen is the softmax of all, divided by the sum of the chosen.
        "moe_router_pre_softmax": not config["norm_topk_prob"],
    }


def _glm4_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    attention = _plain_attention(config)
    return {**attention, **_sigmoid(config), "qk_layernorm": config.get("use_qk_norm", False)}


def _glm4_moe_lite(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_sigmoid(config),
        "multi_latent_attention": True,
        "q_lora_rank": config["q_lora_rank"],
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "rope_type": "rope",
        "qk_layernorm": True,
    }


def _plain_attention(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    return {
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "add_qkv_bias": config.get("attention_bias", False),
    }


def _sigmoid(config: Mapping[str, Any]) -> dict[str, Any]:
    topk, groups = config["num_experts_per_tok"], config.get("n_group") or 1
    _refuse(config["model_type"], {"norm_topk_prob": True}, config)
    if groups > 1 and topk // config["topk_group"] != 2:  # Megatron sums so many, GLM always two
        raise R3PatchError(
            f"load_hf got num_experts_per_tok={topk} and topk_group={config['topk_group']}, "
            "expected twice as many experts as groups: Megatron scores a group otherwise."
        )
    return {
        "num_moe_experts": config["n_routed_experts"],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": config["topk_group"] if groups > 1 else None,
        "moe_shared_expert_intermediate_size": (
            config["n_shared_experts"] * config["moe_intermediate_size"]
        ),
    }


_KINDS = {"qwen3_moe": _qwen3_moe, "glm4_moe": _glm4_moe, "glm4_moe_lite": _glm4_moe_lite}
