"""How a model's layers are numbered, and which of them have a router."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from r3patch._errors import UnsupportedRoutingError


def moe_layers(config: Any) -> tuple[int, ...]:
    """The layers of the main model that have a router, MTP layers not counted.

    Reads a hybrid pattern (``hybrid_layer_pattern``, ``hybrid_override_pattern``) where there is
    one, else ``moe_layer_freq`` and Hugging Face's ``first_k_dense_replace``, ``mlp_only_layers``,
    ``decoder_sparse_step`` and ``mlp_layer_types``.

    Args:
        config: Megatron's TransformerConfig or arguments, a Hugging Face config, or any object
            with the same attributes.

    Returns:
        1-based global layer numbers, ascending; empty for a model without MoE.

    Raises:
        UnsupportedRoutingError: the config does not say how many layers there are, or which of a
            hybrid model's have a router; or its pattern cannot be read or has another length.

    Source: get_gpt_decoder_layer_specs (models/gpt/gpt_layer_specs.py, 0.16.1 and 0.19.2),
    parse_hybrid_pattern (models/hybrid/hybrid_layer_allocation.py, 0.19.2).
    """
    num_layers = _first(config, "num_layers", "num_hidden_layers")
    pattern = _first(config, "hybrid_layer_pattern", "hybrid_override_pattern")
    if isinstance(pattern, str):
        symbols = pattern.split("/")[0].replace("|", "")
        return _numbered("hybrid pattern", [symbol == "E" for symbol in symbols], num_layers)
    if _first(config, "is_hybrid_model"):
        raise UnsupportedRoutingError(
            f"{type(config).__name__} is of a hybrid model, but has no hybrid_layer_pattern: "
            "TransformerConfig does not keep it. Pass an object that does, such as the arguments."
        )
    experts = _first(
        config, "num_moe_experts", "num_experts", "n_routed_experts", "num_local_experts"
    )
    if not experts:
        return ()
    if not isinstance(num_layers, int):
        raise UnsupportedRoutingError(
            f"{type(config).__name__} has num_layers={num_layers!r}, expected an integer "
            "(num_layers or num_hidden_layers)"
        )
    types = _first(config, "mlp_layer_types")
    if types is not None:
        return _numbered("mlp_layer_types", [kind == "sparse" for kind in types], num_layers)
    return _from_frequency(config, num_layers)


def _from_frequency(config: Any, num_layers: int) -> tuple[int, ...]:
    frequency = _first(config, "moe_layer_freq")
    if isinstance(frequency, str):
        frequency = _evaluate(frequency)
    if isinstance(frequency, (list, tuple)):
        return _numbered("moe_layer_freq", frequency, num_layers)
    frequency = 1 if frequency is None else frequency
    if not isinstance(frequency, int) or frequency < 1:
        raise UnsupportedRoutingError(
            f"moe_layer_freq is {frequency!r}, expected a positive integer, a list of 0 and 1, or "
            "a string such as '([0]*3+[1]*58)'"
        )
    dense = set(_first(config, "mlp_only_layers") or ())
    first = _first(config, "first_k_dense_replace") or 0
    step = _first(config, "decoder_sparse_step") or 1
    return _numbered(
        "moe_layer_freq",
        [
            i >= first and i % frequency == 0 and (i + 1) % step == 0 and i not in dense
            for i in range(num_layers)
        ],
        num_layers,
    )


def _first(config: Any, *names: str) -> Any:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), None)


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
