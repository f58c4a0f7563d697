"""A model's routers: found by walking live modules, labelled, verified.

Nothing here imports Megatron or torch: classes are recognised by the name of their module and
their own, in the whole MRO, so that subclasses count, and models that were built before a reload
too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

from r3patch._errors import ScopeConflictError, UnlabelledRouterError, UnsupportedMegatronError
from r3patch.labels import patch
from r3patch.labels import scope as scopes
from r3patch.labels.scope import ATTRIBUTE, MAIN, MTP
from r3patch.labels.targets import ROUTER_MODULE, TARGETS

if TYPE_CHECKING:
    from torch import nn

    Model: TypeAlias = nn.Module | Sequence[nn.Module]

_ROUTER = "router"
_KINDS = {(ROUTER_MODULE, "Router"): _ROUTER} | {
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


@dataclass(frozen=True)
class MainRouter:
    """A router of the main model, as it was when a session or a bridge looked at it.

    One reading of its settings, for everybody: what routes must fit, and what a tap works with.
    """

    info: RouterInfo
    layer_number: int
    topk: int
    num_experts: int
    """Of this layer: pruned models have layers with fewer experts than their config says."""

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def module(self) -> Any:
        return self.info.module

    @classmethod
    def of(cls, info: RouterInfo) -> MainRouter:
        """Read the settings of a router that `verify` has passed."""
        router = info.module
        assert info.layer_number is not None  # verify() refuses main routers without one
        # The number of rows of the gate is what routes; a pruned layer's config may be the model's.
        weight = getattr(router, "weight", None)
        experts = router.config.num_moe_experts if weight is None else weight.shape[0]
        topk = getattr(router, "topk", None) or router.config.moe_router_topk
        return cls(info, info.layer_number, int(topk), int(experts))


@dataclass
class Found:
    """A router of a model, and the way to it."""

    name: str
    module: Any
    chunks: list[int]
    """The chunks that it is a part of: one, unless it is shared."""
    in_mtp: bool
    """Every path to it leads through an MTP module. A shared decoder layer has another path."""

    @property
    def scope(self) -> str | None:
        return getattr(self.module, ATTRIBUTE, None)

    @property
    def layer_number(self) -> int | None:
        return getattr(self.module, "layer_number", None)

    @property
    def info(self) -> RouterInfo:
        return RouterInfo(self.name, self.module, self.scope, self.layer_number)

    @property
    def is_mtp(self) -> bool:
        # Only a True flag says anything: Megatron drops it on several construction paths.
        return self.in_mtp or getattr(self.module, "is_mtp_layer", False) is True


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
    found = find(model)
    if scope is None:
        return [router.info for router in found]
    scopes.checked(scope)
    _refuse_unlabelled(found)
    return [router.info for router in found if router.scope == scope]


def label(model: Model, scope: str | None = None) -> list[RouterInfo]:
    """Label routers that were built without r3patch, and return all routers of the model.

    Args:
        model: a module or a list of chunks, wrapped or not; to set a `scope`, the part of a model
            that is meant.
        scope: the label to set, over whatever there is. None: routers in Megatron's MTP modules,
            or with a true ``is_mtp_layer``, become ``"mtp"``; others keep the label they have, or
            become ``"main"``.
    """
    found = find(model)
    if scope is not None:
        scopes.checked(scope)
    for router in found:
        wanted = scope or (MTP if router.is_mtp else router.scope or MAIN)
        if router.scope != wanted:
            scopes.set_label(router.module, wanted)
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
    found = find(model)
    check(found)
    return [router.info for router in found]


def check(found: list[Found]) -> None:
    """`verify`, for routers that were found already."""
    _refuse_failed_targets()
    _refuse_unlabelled(found)
    main = [router for router in found if router.scope == MAIN]
    _refuse_mislabelled([router for router in main if router.is_mtp])
    _refuse_foreign_numbers(main)
    _refuse_shared_numbers(main)


def main_routers(model: Model) -> list[MainRouter]:
    """The routers with label "main", with the settings that routes must fit.

    Raises:
        UnlabelledRouterError: a router has no label.
    """
    return [MainRouter.of(info) for info in routers(model, MAIN)]


def find(model: Model) -> list[Found]:
    """The routers of a model in the order of its modules, by one walk over its modules."""
    parts = chunks(model)
    found: dict[int, Found] = {}
    for index, part in enumerate(parts):
        seen: tuple[set[int], set[int]] = (set(), set())  # outside of MTP modules, and in them
        # A name is put together only where a router is found: the links lead back to the chunk.
        stack: list[tuple[Any, bool, _Link | None]] = [
            (part, False, (f"chunk{index}", None) if len(parts) > 1 else None)
        ]
        while stack:
            module, in_mtp, link = stack.pop()
            kind = _kind(type(module))  # type: ignore[arg-type]  # mypy: "type is not hashable"
            in_mtp = in_mtp or kind == MTP
            if id(module) in seen[in_mtp]:
                continue
            seen[in_mtp].add(id(module))
            if kind == _ROUTER:
                _note(found, module, index, link, in_mtp=in_mtp)
            children = module._modules
            for name in reversed(children):
                child = children[name]
                if child is not None and (child._modules or _kind(type(child))):  # type: ignore[arg-type]
                    stack.append((child, in_mtp, (name, link)))
    return list(found.values())


_Link: TypeAlias = "tuple[str, _Link | None]"  # a module's name, and that of the module around it


def _path(link: _Link | None) -> str:
    names = []
    while link is not None:
        name, link = link
        names.append(name)
    return ".".join(reversed(names))


def _note(
    found: dict[int, Found], module: Any, chunk: int, link: _Link | None, *, in_mtp: bool
) -> None:
    name = _path(link)
    router = found.setdefault(id(module), Found(name, module, [], in_mtp))
    if chunk not in router.chunks:
        router.chunks.append(chunk)
    if router.in_mtp and not in_mtp:
        router.name, router.in_mtp = name, False
        router.chunks.sort(key=lambda other: other != chunk)  # the one that it belongs to first


@cache
def _kind(cls: type) -> str | None:
    names = ((base.__module__, base.__qualname__) for base in cls.__mro__)
    return next((_KINDS[name] for name in names if name in _KINDS), None)


def _refuse_failed_targets() -> None:
    failed = [target for target in patch.status() if target.state == "failed"]
    if failed:
        raise UnsupportedMegatronError(
            "r3patch is not whole in this process. Failed: "
            + "; ".join(f"{target.name}: {target.detail}" for target in failed)
            + ". Routers built since may have a wrong label or none, or stand in the registry of "
            "another replay manager."
        )


def _refuse_unlabelled(found: list[Found]) -> None:
    bare = [router for router in found if router.scope not in scopes.SCOPES]
    if bare:
        raise UnlabelledRouterError(
            f"{len(bare)} of {len(found)} routers have no scope label: {_names(bare)}. They were "
            "built before r3patch was installed, or by a class that bypasses TopKRouter.__init__. "
            "Import r3patch before the model is built, or call r3patch.label(model)."
        )


def _refuse_mislabelled(routers: list[Found]) -> None:
    if routers:
        raise ScopeConflictError(
            f"labelled 'main', but part of an MTP module or flagged is_mtp_layer: {_names(routers)}"
            ". They were built or copied outside the MTP constructor. Build them inside "
            "r3patch.building('mtp'), or call r3patch.label(model)."
        )


def _refuse_foreign_numbers(main: list[Found]) -> None:
    wrong = [router for router in main if not _is_own_number(router.module)]
    if wrong:
        router = wrong[0].module
        raise ScopeConflictError(
            f"main routers with a layer number outside 1..{_num_layers(router)} (num_layers of "
            f"their config): {_names(wrong, numbers=True)}. If they belong to an MTP head, label "
            "it: r3patch.label(head, scope='mtp')."
        )


def _refuse_shared_numbers(main: list[Found]) -> None:
    by_number: dict[tuple[int, int | None], list[Found]] = defaultdict(list)
    for router in main:
        by_number[router.chunks[0], router.layer_number].append(router)
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


def _names(found: list[Found], *, numbers: bool = False, limit: int = 8) -> str:
    infos = [router.info for router in found[:limit]]
    names = [f"{i.name} (layer {i.layer_number})" if numbers else i.name for i in infos]
    if len(found) > limit:
        names.append(f"and {len(found) - limit} more")
    return ", ".join(names)
