"""What a model's config says: how many layers and experts, and which layers have a router."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from r3patch._errors import UnsupportedRoutingError

_LAYERS = ("num_layers", "num_hidden_layers", "n_layers")
_EXPERTS = (
    "num_moe_experts", "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts",
)  # fmt: skip
_TOPK = (
    "moe_router_topk", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k",
    "moe_top_k", "top_k_experts",
)  # fmt: skip
# Of a model that also sees or speaks, the config of the language model inside.
_INNER = ("text_config", "thinker_config", "llm_config", "language_config")
# Kinds in mlp_layer_types; a layer that is routed by token id has no router to replay.
_KINDS = {"sparse": True, "moe": True, "dense": False, "hash_moe": False}
# The fields that say which layers have experts, and how such a field may be called otherwise.
_SCHEMES = (
    "mlp_layer_types", "layers_block_type", "layers_num_experts", "moe_layers",
    "moe_layer_freq", "first_k_dense_replace", "num_dense_layers", "mlp_only_layers",
    "decoder_sparse_step", "expert_layer_period", "expert_layer_offset",
    "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval",
    "interleave_moe_layer_step", "num_hash_layers", "default_num_hash_layers",
)  # fmt: skip
_LIKE_A_SCHEME = re.compile(
    r"(?!mtp_|num_sparse_|.*_loss|.*window)(.*(moe|expert|sparse|dense|hash|mlp)_.*"
    r"(layer|step|freq|interval|period|offset|index|pattern|replace)|layers?_.*(moe|expert|mlp))"
)


class Sizes(NamedTuple):
    """What `decode` needs to know of a model."""

    num_layers: int
    num_experts: int
    topk: int
    moe_layers: tuple[int, ...]


def sizes(config: Any) -> Sizes:
    """The sizes of a model with MoE, from the same configs as `moe_layers`.

    Raises:
        UnsupportedRoutingError: as `moe_layers`; or the config has no MoE layer, or no integer for
            one of the sizes.
    """
    layers = moe_layers(config)
    config = _language_model(config)
    if not layers:
        raise UnsupportedRoutingError(f"{_name(config)} is of a model without MoE layers")
    found = {"num_layers": _num_layers(config), "num_experts": _experts(config)}
    found["topk"] = _first(config, *_TOPK) or _first(_get(config, "ffn_config"), *_TOPK)
    for name, value in found.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise UnsupportedRoutingError(f"{_name(config)} says {name}={value!r}, expected an int")
    return Sizes(**found, moe_layers=layers)


def moe_layers(config: Any) -> tuple[int, ...]:
    """The layers of the main model that have a router, MTP layers not counted.

    Layers that are routed by token id (hash) have none. Of a composite config the language
    model's part is read.

    Args:
        config: Megatron's TransformerConfig or arguments, a Hugging Face config, the mapping of a
            ``config.json``, or any object with the same attributes.

    Returns:
        1-based global layer numbers, ascending; empty for a model without MoE.

    Raises:
        UnsupportedRoutingError: the config does not say how many layers there are, or which of a
            hybrid model's have a router; its pattern cannot be read or has another length; or it
            has a field for its MoE layers that is not known here.

    Source: get_gpt_decoder_layer_specs (models/gpt/gpt_layer_specs.py, 0.16.1 and 0.19.2) and
    parse_hybrid_pattern (models/hybrid/hybrid_layer_allocation.py, 0.19.2) of Megatron; the
    decoder layers of the MoE models in transformers 5.24.
    """
    config = _language_model(config)
    num_layers = _num_layers(config)
    pattern = _first(config, "hybrid_layer_pattern", "hybrid_override_pattern")
    if isinstance(pattern, str):
        symbols = pattern.split("/")[0].replace("|", "")
        return _numbered("hybrid pattern", [symbol == "E" for symbol in symbols], num_layers)
    if _get(config, "is_hybrid_model"):
        raise UnsupportedRoutingError(
            f"{_name(config)} is of a hybrid model, but has no hybrid_layer_pattern: "
            "TransformerConfig does not keep it. Pass an object that does, such as the arguments."
        )
    if not _has_experts(config):
        return ()
    if not isinstance(num_layers, int):
        raise UnsupportedRoutingError(
            f"{_name(config)} has num_layers={num_layers!r}, expected an integer "
            "(num_layers or num_hidden_layers)"
        )
    if _get(config, "is_encoder_decoder"):
        raise UnsupportedRoutingError(f"{_name(config)} is of an encoder-decoder model")
    _refuse_unknown_schemes(config)
    listed = _from_list(config, num_layers)
    return _from_rules(config, num_layers) if listed is None else listed


def _from_list(config: Any, num_layers: int) -> tuple[int, ...] | None:
    """Where the config says it layer by layer."""
    kinds = _get(config, "mlp_layer_types")
    if kinds is not None:
        unknown = set(kinds) - _KINDS.keys()
        if unknown:
            raise UnsupportedRoutingError(
                f"mlp_layer_types has kinds {sorted(unknown)}, expected some of {[*_KINDS]}"
            )
        return _numbered("mlp_layer_types", [_KINDS[kind] for kind in kinds], num_layers)
    blocks = _get(config, "layers_block_type")
    if blocks is not None and "moe" in blocks:
        return _numbered("layers_block_type", [block == "moe" for block in blocks], num_layers)
    counts = _get(config, "layers_num_experts") or _experts(config)
    if isinstance(counts, (list, tuple)):
        return _numbered("layers_num_experts", [count > 1 for count in counts], num_layers)
    indices = _get(config, "moe_layers")
    if isinstance(indices, (list, tuple)):  # counted from 0
        return _numbered("moe_layers", [i in indices for i in range(num_layers)], num_layers)
    frequency = _get(config, "moe_layer_freq")
    if isinstance(frequency, str):
        frequency = _evaluate(frequency)
    if isinstance(frequency, (list, tuple)):
        return _numbered("moe_layer_freq", frequency, num_layers)
    return None


def _from_rules(config: Any, num_layers: int) -> tuple[int, ...]:
    """Where it gives numbers: a layer has a router if every rule lets it."""
    frequency = _get(config, "moe_layer_freq")
    frequency = _evaluate(frequency) if isinstance(frequency, str) else frequency
    frequency = 1 if frequency is None else frequency
    if not isinstance(frequency, int) or frequency < 1:
        raise UnsupportedRoutingError(
            f"moe_layer_freq is {frequency!r}, expected a positive integer, a list of 0 and 1, or "
            "a string such as '([0]*3+[1]*58)'"
        )
    dense = set(_get(config, "mlp_only_layers") or ())
    first = max(
        _get(config, name) or 0
        for name in (
            "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_hash_layers"
        )
    )  # fmt: skip
    last = _get(config, "moe_layer_end_index")
    last = num_layers - 1 if last in (None, -1) else last
    steps = [
        _get(config, name) or 1
        for name in ("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step")
    ]
    period = _get(config, "expert_layer_period") or 1
    offset = _get(config, "expert_layer_offset") or 0
    return _numbered(
        "the config",
        [
            first <= i <= last
            and i % frequency == 0
            and all((i + 1) % step == 0 for step in steps)
            and i % period == offset % period
            and i not in dense
            for i in range(num_layers)
        ],
        num_layers,
    )


def _refuse_unknown_schemes(config: Any) -> None:
    """A model whose rule is not known would come out as one with experts in every layer."""
    if _first(config, "num_moe_experts", "moe_router_topk"):
        return  # Megatron's own fields are known
    fields = config if isinstance(config, Mapping) else vars(config)
    unknown = sorted(
        name
        for name, value in fields.items()
        if name not in _SCHEMES
        and _LIKE_A_SCHEME.match(name)
        and value
        and not isinstance(value, (bool, float))
    )
    if unknown:
        raise UnsupportedRoutingError(
            f"{_name(config)} has {', '.join(f'{name}={fields[name]!r}' for name in unknown)}, "
            "which may say what layers are MoE layers and is not known here: pass moe_layers= "
            "yourself, and report the model"
        )


def _language_model(config: Any) -> Any:
    inner = _first(config, *_INNER)
    return _language_model(inner) if inner else config


def _has_experts(config: Any) -> bool:
    if False in (_get(config, "is_moe"), _get(config, "enable_moe_block")):
        return False
    if _get(config, "num_moe_experts"):
        return True
    experts = _experts(config)
    # Hugging Face's models of one expert build a plain MLP.
    return isinstance(experts, (list, tuple)) or (experts or 0) > 1


def _experts(config: Any) -> Any:
    """How many experts a layer has, or a list of it; DBRX keeps it in a config of its own."""
    experts = _first(config, *_EXPERTS)
    return _first(_get(config, "ffn_config"), *_EXPERTS) if experts is None else experts


def _num_layers(config: Any) -> Any:
    return _first(config, *_LAYERS)


def _first(config: Any, *names: str) -> Any:
    values = (_get(config, name) for name in names)
    return next((value for value in values if value is not None), None)


def _get(config: Any, name: str) -> Any:
    try:
        return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    except Exception as error:  # transformers: an attribute that differs from layer to layer
        raise UnsupportedRoutingError(f"{_name(config)}.{name} cannot be read: {error}") from error


def _name(config: Any) -> str:
    return type(config).__name__


def _numbered(source: str, flags: Iterable[object], num_layers: object) -> tuple[int, ...]:
    flags = list(flags)
    if num_layers is not None and len(flags) != num_layers:
        raise UnsupportedRoutingError(
            f"{source} describes {len(flags)} layers, but the model has {num_layers}"
        )
    return tuple(number for number, is_moe in enumerate(flags, start=1) if is_moe)


def _evaluate(text: str) -> Any:
    """The value of an expression of lists, integers, ``+`` and ``*``, as Megatron's CLI takes it.

    Source: moe_freq_type (megatron/training/arguments.py, 0.16.1), which calls eval().
    """

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.List(elts=items):
                return [value(item) for item in items]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
        raise TypeError(ast.dump(node))

    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError):
        raise UnsupportedRoutingError(
            f"moe_layer_freq is {text!r}, expected an integer or lists of 0 and 1 joined by + and "
            "*, such as '([0]*3+[1]*58)'"
        ) from None
