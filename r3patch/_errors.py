"""The errors of r3patch.

Each is built from one string, because Megatron's ``build_module`` re-raises ``type(e)(str)``
(megatron/core/transformer/spec_utils.py). None is an ``ImportError``: frameworks guard their
Megatron imports with ``except ImportError`` and would swallow it.
"""

from __future__ import annotations


class R3PatchError(RuntimeError):
    """Base class of every error that r3patch raises on purpose."""


class UnsupportedMegatronError(R3PatchError):
    """The installed Megatron lacks something that the call needs."""


class UnsupportedRoutingError(R3PatchError):
    """A router is set up in a way that replay cannot reach, such as sinkhorn or CUDA graphs."""


class UnlabelledRouterError(R3PatchError):
    """A router carries no scope label: it was built before ``import r3patch``."""


class ScopeConflictError(R3PatchError):
    """A router's label contradicts its ancestors, Megatron's own flag, or another router."""


class RoutesError(R3PatchError):
    """A rollout payload or a ``Routes`` object is malformed."""


class ReplayError(R3PatchError):
    """A record or replay session is used wrongly."""


class ConfigError(R3PatchError):
    """An ``R3PATCH_`` environment variable has a name or a value that is not in the table."""


# Users meet these as ``r3patch.RoutesError``; tracebacks and pickles should say so too.
for _error in list(vars().values()):
    if isinstance(_error, type) and issubclass(_error, R3PatchError):
        _error.__module__ = "r3patch"
del _error
