"""The constructors that labels come from, wrapped: the one module that imports wrapt.

Constructors are wrapped in place (``vars(cls)["__init__"]``), so it does not matter who imported
the class, or when. Nothing else is wrapped: torch.compile looks through wrapt wrappers and runs
what is underneath, in silence, so a wrapper on a forward path could not be trusted.

An import hook must not raise, since that would break the user's ``import megatron``, and must not
fail in silence: what goes wrong is kept as the state ``failed``, which `r3patch.status` and
`r3patch.verify` report.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple

import wrapt

from r3patch import _config
from r3patch._errors import UnsupportedMegatronError
from r3patch.labels import scope as scopes
from r3patch.labels.targets import TARGETS, Target, megatron_found

logger = logging.getLogger(__name__)

Wrapper = Callable[[Callable[..., None], Any, tuple[Any, ...], dict[str, Any]], None]


class TargetStatus(NamedTuple):
    """One thing that is patched, and how that went."""

    name: str
    state: str
    """``pending``, ``installed``, ``failed``, ``disabled`` or ``buried``."""
    detail: str


class _Patch(NamedTuple):
    owner: Any
    wrapper: Any


#: Asked by `status` for what else failed, so that labels need not know who else patches.
reporters: list[Callable[[], Iterable[TargetStatus]]] = []

_lock = threading.RLock()
_active = False
_patches: dict[str, _Patch] = {}
_failures: dict[str, str] = {}


def install() -> None:
    """Wrap the constructors of `TARGETS`, those of modules to come when they are imported."""
    global _active
    with _lock:
        _active = True
    for name in dict.fromkeys(target.module for target in TARGETS):
        when_imported(name, _wrap_constructors)


def uninstall() -> None:
    """Give Megatron its constructors back, or, below somebody else's wrapper, pass through."""
    global _active
    with _lock:
        _active = False
        _failures.clear()
        for name, (owner, wrapper) in list(_patches.items()):
            if vars(owner).get("__init__") is wrapper:
                owner.__init__ = wrapper.__wrapped__
                del _patches[name]


def status() -> tuple[TargetStatus, ...]:
    """The state of every target as it is now, and whatever else failed: import hooks, bridges."""
    with _lock:
        targets = [_status_of(target) for target in TARGETS]
        own = {target.name for target in TARGETS}
        hooks = [
            TargetStatus(name, "failed", reason)
            for name, reason in _failures.items()
            if name not in own
        ]
    others = [failed for report in tuple(reporters) for failed in report()]
    return (*targets, *hooks, *others)


def when_imported(name: str, hook: Callable[[ModuleType], None]) -> None:
    """Call `hook` with the module `name`: now if it is imported, else once it is.

    An exception in the hook is logged and kept for `status`; the import goes on. The hook must be
    safe to call twice: every `install` registers again, because wrapt forgets hooks that it fired.
    """

    def guarded(module: ModuleType) -> None:
        try:
            hook(module)
        except Exception as error:
            _record_failure(name, f"{type(error).__name__}: {error}")

    if name in sys.modules:  # wrapt 1 waits for an import even so, if others wait for one
        guarded(sys.modules[name])
    else:
        wrapt.register_post_import_hook(guarded, name)


def _record_failure(name: str, reason: str) -> None:
    with _lock:
        _failures[name] = reason
    logger.warning("r3patch could not patch %s: %s", name, reason)


def _wrap_constructors(module: ModuleType) -> None:
    """Wrap all targets of one module, or none of them."""
    with _lock:
        if not _active:
            return
        targets = [target for target in TARGETS if target.module == module.__name__]
        try:
            owners = [_owner(module, target) for target in targets]
        except UnsupportedMegatronError as error:
            for target in targets:
                _record_failure(target.name, str(error))
            return
        for target, owner in zip(targets, owners, strict=True):
            _failures.pop(target.name, None)
            _wrap(target, owner)


def _wrap(target: Target, owner: Any) -> None:
    patch = _patches.get(target.name)
    if patch is not None and patch.owner is owner and _is_below(owner, patch.wrapper):
        return
    effect = _label_router if target.opens is None else _open_scope(target.opens)
    wrapper = wrapt.FunctionWrapper(vars(owner)["__init__"], effect, enabled=_is_active)
    owner.__init__ = wrapper
    _patches[target.name] = _Patch(owner, wrapper)
    logger.info("r3patch wraps the constructor of %s", target.name)


def _owner(module: ModuleType, target: Target) -> type:
    """The class whose constructor is to be wrapped, if it has the shape we know."""
    owner = getattr(module, target.qualname, None)
    looked_for = f"looked for a class {target.qualname} with a constructor of its own"
    if owner is None and getattr(module.__spec__, "_initializing", False):
        found = f"{module.__name__} is only half imported"
        todo = "Import r3patch before megatron, or call r3patch.install() after the import."
    elif not isinstance(owner, type):
        found = f"{target.name} is {owner!r}"
        todo = "The stock releases 0.12.3 to 0.19.2 have it; does a fork or a patch replace it?"
    elif "__init__" not in vars(owner):
        found = f"it inherits that of {owner.__mro__[1].__qualname__}"
        todo = "In the stock releases 0.12.3 to 0.19.2 it has its own; is this a fork?"
    else:
        return owner
    raise UnsupportedMegatronError(f"{looked_for}, but {found} ({megatron_found()}). {todo}")


def _is_active() -> bool:
    return _active


def _is_below(owner: type, wrapper: Any) -> bool:
    """Whether `wrapper` is reachable from the constructor of `owner`."""
    layer = vars(owner).get("__init__")
    for _ in range(64):
        # `Class.__init__` gives a wrapper bound to the class, which is what others wrap.
        if layer is wrapper or getattr(layer, "_self_parent", None) is wrapper:
            return True
        layer = getattr(layer, "__wrapped__", None)
    return False


def _status_of(target: Target) -> TargetStatus:
    module = sys.modules.get(target.module)
    owner = getattr(module, target.qualname, None)
    patch = _patches.get(target.name)
    if patch is not None and patch.owner is not owner:
        patch = None
    if not _active:
        if patch is not None:
            return TargetStatus(
                target.name, "buried", "below somebody else's wrapper; ours calls straight through"
            )
        why = "R3PATCH_DISABLE=1" if _config.CONFIG.disable else "uninstalled"
        return TargetStatus(target.name, "disabled", why)
    if module is None:
        return TargetStatus(target.name, "pending", "its module is not imported yet")
    if patch is None:
        lost = f"{target.module} was imported or reloaded past r3patch; call r3patch.install()"
        return TargetStatus(target.name, "failed", _failures.get(target.name, lost))
    return TargetStatus(target.name, "installed", _detail(patch))


def _detail(patch: _Patch) -> str:
    if vars(patch.owner).get("__init__") is patch.wrapper:
        return ""
    if _is_below(patch.owner, patch.wrapper):
        return "below somebody else's wrapper"
    return (
        "the constructor was replaced since; labels hold if the new one calls the one it replaced"
    )


def _label_router(
    wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    wrapped(*args, **kwargs)
    scopes.label_newborn(instance)


def _open_scope(scope: str) -> Wrapper:
    def construct(
        wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        with scopes.constructing(instance, scope):
            wrapped(*args, **kwargs)

    return construct
