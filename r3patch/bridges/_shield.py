"""Keeping a manager out of a module: out of its registry, its hooks, and its calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from r3patch.bridges._log import log_once


class Shield:
    """Around every forward of a module, by exceptions too, a manager rests.

    A fork's top-k function asks the manager whatever the module, and finds there what the last
    main one left. On stock Megatron nothing asks, and the shield has no effect. Its hooks are
    methods rather than closures, so that a model with MTP can still be pickled.

    Args:
        rest: a module-level function that puts the manager to rest and returns its stage.
        wake: a module-level function that gives the manager that stage back.
    """

    def __init__(self, rest: Callable[[], Any], wake: Callable[[Any], None]) -> None:
        self._rest, self._wake = rest, wake
        self._stages: list[Any] = []

    def before(self, module: Any, args: Any) -> None:
        self._stages.append(self._rest())

    def after(self, module: Any, args: Any, output: Any) -> None:
        if self._stages:  # a hook before ours may have raised
            self._wake(self._stages.pop())

    def cover(self, module: Any) -> None:
        """Set it up, once for each manager."""
        if not is_shielded(module, self._rest):
            module.register_forward_pre_hook(self.before)
            module.register_forward_hook(self.after, always_call=True)


def is_shielded(module: Any, rest: Callable[[], Any]) -> bool:
    """Whether a module has the shield from the manager that `rest` puts to rest."""
    return bool(_shield_keys(module._forward_pre_hooks, rest))


def uncover(module: Any, rest: Callable[[], Any]) -> None:
    """Take the shield from the manager that `rest` puts to rest away."""
    for key in _shield_keys(module._forward_pre_hooks, rest):
        del module._forward_pre_hooks[key]
    for key in _shield_keys(module._forward_hooks, rest):
        del module._forward_hooks[key]
        module._forward_hooks_always_called.pop(key, None)


def _shield_keys(hooks: Any, rest: Callable[[], Any]) -> list[int]:
    owners = {key: getattr(hook, "__self__", None) for key, hook in hooks.items()}
    return [k for k, owner in owners.items() if isinstance(owner, Shield) and owner._rest is rest]


def warn_unregistered(name: str) -> None:
    """A manager fills its streams by position, so a router cannot come back at the end."""
    log_once(
        f"a router was labelled main again, but {name} does not replay on it: label routers "
        "before the manager registers them, or rebuild the model"
    )


def forget(registry: list[Any], entry: object) -> None:
    """Remove an object from a registry, by identity."""
    registry[:] = [known for known in registry if known is not entry]


def drop_hooks(module: Any, module_name: str) -> None:
    """Remove the forward-pre-hooks that the Python module `module_name` has put on a module."""
    hooks = module._forward_pre_hooks
    for key in [k for k, hook in hooks.items() if getattr(hook, "__module__", "") == module_name]:
        del hooks[key]
