"""Labels: which scope a router was built in, and how it comes to know.

A router gets its label from the construction scope that is open while its constructor runs. The
scope is a ContextVar, read during construction only; the label is a plain ``str`` on the
instance, so it survives deepcopy, pickle and spawn, and costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from r3patch._errors import UnlabelledRouterError

if TYPE_CHECKING:
    from torch import nn

MAIN = "main"
MTP = "mtp"
SCOPES = (MAIN, MTP)
ATTRIBUTE = "r3_scope"

#: Called with a router each time it is given a label: at the end of its constructor, and again
#: if it is relabelled. What a listener does must be safe to do twice.
listeners: list[Callable[[nn.Module], None]] = []

#: Entered around each constructor that opens a scope, with what it builds and the scope. What
#: follows the `yield` of one is not run if the constructor raises.
constructions: list[Callable[[nn.Module, str], AbstractContextManager[None]]] = []

_open: ContextVar[str | None] = ContextVar("r3patch_scope", default=None)

_born: ContextVar[list[nn.Module] | None] = ContextVar("r3patch_born", default=None)

# A ContextVar does not reach the threads of a pool. So while an MTP constructor runs, routers
# that are born without a scope, in whatever thread, are noted for it: those that it turns out to
# own are its own. Keyed by id, because lists have no hash and compare by content.
_unscoped_births: dict[int, list[nn.Module]] = {}


def current() -> str:
    """The scope that a router built here and now would get."""
    return _open.get() or MAIN


@contextmanager
def building(scope: str) -> Iterator[None]:
    """Label the routers that are built inside the block, in this thread.

    For multi-token-prediction heads that do not use Megatron's MTP classes. A thread started
    inside the block does not inherit the scope unless it is run in a copy of the context
    (``contextvars.copy_context().run``).

    Args:
        scope: ``"main"`` or ``"mtp"``.

    Raises:
        ValueError: for any other scope.
    """
    born: list[nn.Module] = []
    tokens = _open.set(checked(scope)), _born.set(born)
    try:
        yield
    finally:
        _open.reset(tokens[0])
        _born.reset(tokens[1])
    # Once more, now that every wrapper around the router's own constructor is done: another patch
    # on top of ours may have registered the router after we labelled it.
    for router in born:
        set_label(router, scope_of(router))


@contextmanager
def constructing(owner: nn.Module, scope: str) -> Iterator[None]:
    """Around a constructor: what `owner` builds gets `scope`, in whatever thread it is built.

    A module that existed before the constructor started keeps its label, even where `owner`
    holds it (a shared decoder layer).
    """
    births: list[nn.Module] = []
    _unscoped_births[id(births)] = births
    try:
        with ExitStack() as around:
            for construction in tuple(constructions):
                around.enter_context(construction(owner, scope))
            with building(scope):
                yield
    finally:
        del _unscoped_births[id(births)]
    if births:
        owned = {id(module) for module in owner.modules()}
        for router in births:
            if id(router) in owned and scope_of(router) != scope:
                set_label(router, scope)


def label_newborn(router: nn.Module) -> None:
    """Label a router whose constructor has just returned."""
    scope = _open.get()
    set_label(router, scope or MAIN)
    born = _born.get()
    if born is not None:
        born.append(router)
    if scope is None:
        for births in tuple(_unscoped_births.values()):
            births.append(router)


def set_label(router: nn.Module, scope: str) -> None:
    """Write a label. Nothing else does."""
    setattr(router, ATTRIBUTE, scope)
    for listener in tuple(listeners):
        listener(router)


def scope_of(router: nn.Module) -> str:
    """The scope a router was built in: ``"main"`` or ``"mtp"``.

    Raises:
        UnlabelledRouterError: the router has no label.
    """
    scope = getattr(router, ATTRIBUTE, None)
    if scope not in SCOPES:
        raise UnlabelledRouterError(
            f"this {type(router).__name__} has no scope label (its {ATTRIBUTE} is {scope!r}, "
            f"expected 'main' or 'mtp'): it was built before r3patch was installed. Import r3patch "
            "before the model is built, or call r3patch.label(model)."
        )
    return str(scope)


def checked(scope: str) -> str:
    """`scope`, if it is one."""
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}, expected 'main' or 'mtp'")
    return scope
