"""What of Megatron is patched and why; how its models are walked; how its layers are numbered.

With ``bridges/`` and ``testing/`` the only place that names Megatron. Nothing here imports it or
torch: classes are recognised by the name of their module and their own, in the whole MRO, so that
subclasses count, and models that were built before a reload too.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from r3patch import _scope
from r3patch._errors import (
    ScopeConflictError,
    UnlabelledRouterError,
    UnsupportedMegatronError,
    UnsupportedRoutingError,
)
from r3patch._scope import ATTRIBUTE, MAIN, MTP

if TYPE_CHECKING:
    from torch import nn

    Model: TypeAlias = nn.Module | Sequence[nn.Module]


@dataclass(frozen=True)
class Target:
    """A class whose constructor is wrapped."""

    module: str
    qualname: str
    opens: str | None
    """The scope that is open while it builds; None: it is a router, and labels itself."""
    why: str

    @property
    def name(self) -> str:
        return f"{self.module}.{self.qualname}"


_ROUTER_MODULE = "megatron.core.transformer.moe.router"
_MTP_MODULE = "megatron.core.transformer.multi_token_prediction"

#: Everything of Megatron that `r3patch.install` touches. Deliberately not here: any ``forward``,
#: ``routing`` or top-k function (see _patch), and the MTP *specs*, which build no module and share
#: their layer spec with the last decoder layer.
#: Source: the classes and module paths are the same in megatron-core 0.12.3 to 0.19.2.
TARGETS = (
    Target(
        _ROUTER_MODULE,
        "TopKRouter",
        None,
        "every router that replay can reach is one or derives from it (InferenceTopKRouter)",
    ),
    Target(
        _MTP_MODULE,
        "MultiTokenPredictionBlock",
        MTP,
        "all MTP depths are built in it, subclasses and hybrid stacks included",
    ),
    Target(
        _MTP_MODULE,
        "MultiTokenPredictionLayer",
        MTP,
        "frameworks build single layers of it without the block",
    ),
)

_ROUTER = "router"
_KINDS = {(_ROUTER_MODULE, "Router"): _ROUTER} | {
    (target.module, target.qualname): MTP for target in TARGETS if target.opens == MTP
}


@dataclass(frozen=True)
class RouterInfo:
    """One router of a model."""

    name: str
    """Its module path; with several chunks, below ``chunk0``, ``chunk1``, ..."""
    module: Any
    """A Megatron ``Router``. Any, because Megatron carries no types."""
    scope: str | None
    """``"main"``, ``"mtp"``, or None if it has no label."""
    layer_number: int | None
    """1-based. Global over pipeline stages for main routers; an MTP router's may be anything."""


@dataclass
class _Found:
    name: str
    module: Any
    chunk: int
    in_mtp: bool
    """Every path to it leads through an MTP module. A shared decoder layer has another path."""

    @property
    def info(self) -> RouterInfo:
        scope = getattr(self.module, ATTRIBUTE, None)
        number = getattr(self.module, "layer_number", None)
        return RouterInfo(self.name, self.module, scope, number)

    @property
    def is_mtp(self) -> bool:
        # Only a True flag says anything: Megatron drops it on several construction paths.
        return self.in_mtp or getattr(self.module, "is_mtp_layer", False) is True


def megatron_version() -> str:
    """For messages only: what Megatron can do is found by looking, never by version."""
    return str(getattr(sys.modules.get("megatron.core"), "__version__", "of unknown version"))


def chunks(model: Model) -> list[nn.Module]:
    """The chunks of a model: several with a virtual pipeline, otherwise the model itself.

    Raises:
        TypeError: `model` is neither a module nor a list or tuple of modules.
    """
    found: list[Any] = list(model) if isinstance(model, (list, tuple)) else [model]
    for chunk in found:
        if not callable(getattr(chunk, "named_modules", None)):
            raise TypeError(
                f"model is {type(chunk).__name__}, expected a torch module or a list of them"
            )
    return found


def routers(model: Model, scope: str | None = None) -> list[RouterInfo]:
    """The MoE routers of a model, in the order of its modules; shared ones once.

    Args:
        model: a module or a list of chunks, wrapped (DDP, Float16Module) or not.
        scope: only those with this label, ``"main"`` or ``"mtp"``; None for all.

    Raises:
        UnlabelledRouterError: with `scope`, if a router has no label.
    """
    found = _find(model)
    if scope is None:
        return [router.info for router in found]
    _scope.checked(scope)
    _refuse_unlabelled(found)
    return [router.info for router in found if router.info.scope == scope]


def label(model: Model, scope: str | None = None) -> list[RouterInfo]:
    """Label routers that were built without r3patch, and return all routers of the model.

    Args:
        model: a module or a list of chunks, wrapped or not; to set a `scope`, the part of a model
            that is meant.
        scope: the label to set, over whatever there is. None: routers in Megatron's MTP modules,
            or with a true ``is_mtp_layer``, become ``"mtp"``; others keep the label they have, or
            become ``"main"``.
    """
    found = _find(model)
    if scope is not None:
        _scope.checked(scope)
    for router in found:
        wanted = scope or (MTP if router.is_mtp else router.info.scope or MAIN)
        if router.info.scope != wanted:
            _scope.set_label(router.module, wanted)
    return [router.info for router in found]


def verify(model: Model) -> list[RouterInfo]:
    """Check that the labels of a model can be trusted, and return its routers.

    Raises:
        UnsupportedMegatronError: a constructor could not be wrapped (see `r3patch.status`).
        UnlabelledRouterError: a router has no label.
        ScopeConflictError: a label contradicts the router's ancestors or a true ``is_mtp_layer``;
            two main routers of a chunk have one layer number; or the layer number of a main
            router is not one of the model's.
    """
    _refuse_failed_targets()
    found = _find(model)
    _refuse_unlabelled(found)
    main = [router for router in found if router.info.scope == MAIN]
    _refuse_mislabelled([router for router in main if router.is_mtp])
    _refuse_foreign_numbers(main)
    _refuse_shared_numbers(main)
    return [router.info for router in found]


def _find(model: Model) -> list[_Found]:
    parts = chunks(model)
    found: dict[int, _Found] = {}
    seen: set[tuple[int, bool]] = set()

    def visit(module: Any, path: tuple[str, ...], chunk: int, in_mtp: bool) -> None:
        kind = _kind(type(module))  # type: ignore[arg-type]  # mypy: "type is not hashable"
        in_mtp = in_mtp or kind == MTP
        if (id(module), in_mtp) in seen:
            return
        seen.add((id(module), in_mtp))
        if kind == _ROUTER:
            name = ".".join(path)
            router = found.setdefault(id(module), _Found(name, module, chunk, in_mtp))
            if router.in_mtp and not in_mtp:
                router.name, router.chunk, router.in_mtp = name, chunk, False
        for name, child in module.named_children():
            visit(child, (*path, name), chunk, in_mtp)

    for index, part in enumerate(parts):
        visit(part, (f"chunk{index}",) if len(parts) > 1 else (), index, False)
    return list(found.values())


@cache  # a session walks the model at every step
def _kind(cls: type) -> str | None:
    names = ((base.__module__, base.__qualname__) for base in cls.__mro__)
    return next((_KINDS[name] for name in names if name in _KINDS), None)


def _refuse_failed_targets() -> None:
    from r3patch import _patch  # it reads TARGETS from here

    failed = [target for target in _patch.status().targets if target.state == "failed"]
    if failed:
        raise UnsupportedMegatronError(
            "r3patch could not patch "
            + "; ".join(f"{target.name}: {target.detail}" for target in failed)
            + ". Routers built since may be labelled wrongly or not at all."
        )


def _refuse_unlabelled(found: list[_Found]) -> None:
    bare = [router for router in found if router.info.scope not in _scope.SCOPES]
    if bare:
        raise UnlabelledRouterError(
            f"{len(bare)} of {len(found)} routers have no scope label: {_names(bare)}. They were "
            "built before r3patch was installed, or by a class that bypasses TopKRouter.__init__. "
            "Import r3patch before the model is built, or call r3patch.label(model)."
        )


def _refuse_mislabelled(routers: list[_Found]) -> None:
    if routers:
        raise ScopeConflictError(
            f"labelled 'main', but part of an MTP module or flagged is_mtp_layer: {_names(routers)}"
            ". They were built or copied outside the MTP constructor. Build them inside "
            "r3patch.building('mtp'), or call r3patch.label(model)."
        )


def _refuse_foreign_numbers(main: list[_Found]) -> None:
    wrong = [router for router in main if not _is_own_number(router.module)]
    if wrong:
        router = wrong[0].module
        raise ScopeConflictError(
            f"main routers with a layer number outside 1..{_num_layers(router)} (num_layers of "
            f"their config): {_names(wrong, numbers=True)}. If they belong to an MTP head, label "
            "it: r3patch.label(head, scope='mtp')."
        )


def _refuse_shared_numbers(main: list[_Found]) -> None:
    by_number: dict[tuple[int, int | None], list[_Found]] = defaultdict(list)
    for router in main:
        by_number[router.chunk, router.info.layer_number].append(router)
    for twins in by_number.values():
        if len(twins) > 1:
            raise ScopeConflictError(
                f"{len(twins)} main routers of one model share a layer number: "
                f"{_names(twins, numbers=True)}. If all but one belong to an MTP head, label it: "
                "r3patch.label(head, scope='mtp')."
            )


def _is_own_number(router: Any) -> bool:
    number, num_layers = getattr(router, "layer_number", None), _num_layers(router)
    return number is not None and 1 <= number <= (num_layers or number)


def _num_layers(router: Any) -> int | None:
    return getattr(getattr(router, "config", None), "num_layers", None)


def _names(found: list[_Found], *, numbers: bool = False, limit: int = 8) -> str:
    infos = [router.info for router in found[:limit]]
    names = [f"{i.name} (layer {i.layer_number})" if numbers else i.name for i in infos]
    if len(found) > limit:
        names.append(f"and {len(found) - limit} more")
    return ", ".join(names)


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
