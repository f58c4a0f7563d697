"""Rollout routing replay (R3) for MoE models on stock Megatron, with one import.

In RL post-training the rollout engine (SGLang, vLLM) and Megatron route part of the tokens to
different experts, so the policy that trains is not the policy that generated. R3 (arXiv
2510.11370) makes the training routers use the experts that the rollout chose; gate weights still
come from the live logits, so gradients reach the router.

Multi-token-prediction (MTP) layers have routers too, and no rollout routes. So each router is
labelled ``"main"`` or ``"mtp"`` when it is built, and replay asks the label at every call.

Use
    Import it anywhere before the model is built; the order relative to Megatron does not matter::

        import r3patch  # noqa: F401  (labels routers from now on)

        model = ...                        # a Megatron model, or a list of chunks
        with r3patch.replay(model, microbatches):
            ...                            # forward and backward, any schedule, any recompute

Labels
    `install`, `uninstall`, `status`: constructors are wrapped at import, nothing else.
    `routers`, `scope_of`, `verify`: what the model has, and whether it can be trusted.
    `building`, `label`: MTP heads that do not use Megatron's MTP classes; models that were built
    before the import.

Sessions
    `replay`, `record`, `ReplayManager`; `ReplaySession`, `RecordSession`, `ReplayStats`.

Data
    `Routes`: the experts of a sample or of a microbatch. `decode`, `decode_batch`: what an engine
    sent, to `Routes`. `Layout`: samples to the rows of this rank. `moe_layers`: which layers have
    columns.

Environment
    ``R3PATCH_DISABLE``, ``R3PATCH_NATIVE``, ``R3PATCH_BRIDGES``, ``R3PATCH_MEASURE``,
    ``R3PATCH_ALARM``, ``R3PATCH_TRACE``, ``R3PATCH_AUTO``; any other value or name is an error at
    import.

The import takes neither torch, numpy nor Megatron with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from r3patch import _config
from r3patch._errors import (
    ConfigError,
    R3PatchError,
    ReplayError,
    RoutesError,
    ScopeConflictError,
    UnlabelledRouterError,
    UnsupportedMegatronError,
    UnsupportedRoutingError,
)
from r3patch._install import Status, TargetStatus, install, status, uninstall
from r3patch._layers import moe_layers
from r3patch.labels.model import RouterInfo, label, routers, verify
from r3patch.labels.scope import building, scope_of

if TYPE_CHECKING:
    from r3patch import bridges, metrics, testing
    from r3patch.observe.stats import ReplayStats
    from r3patch.rows.batch import decode_batch
    from r3patch.rows.decode import decode
    from r3patch.rows.layout import Layout
    from r3patch.rows.routes import Routes
    from r3patch.sessions.manager import (
        RecordSession,
        ReplayManager,
        ReplaySession,
        record,
        replay,
    )

    __version__: str

__all__ = [
    "ConfigError",
    "Layout",
    "R3PatchError",
    "RecordSession",
    "ReplayError",
    "ReplayManager",
    "ReplaySession",
    "ReplayStats",
    "RouterInfo",
    "Routes",
    "RoutesError",
    "ScopeConflictError",
    "Status",
    "TargetStatus",
    "UnlabelledRouterError",
    "UnsupportedMegatronError",
    "UnsupportedRoutingError",
    "__version__",
    "bridges",
    "building",
    "decode",
    "decode_batch",
    "install",
    "label",
    "metrics",
    "moe_layers",
    "record",
    "replay",
    "routers",
    "scope_of",
    "status",
    "testing",
    "uninstall",
    "verify",
]

# These need torch, so they are loaded when they are first asked for.
_HOMES = {
    "Layout": "rows.layout",
    "RecordSession": "sessions.manager",
    "ReplayManager": "sessions.manager",
    "ReplaySession": "sessions.manager",
    "ReplayStats": "observe.stats",
    "Routes": "rows.routes",
    "decode": "rows.decode",
    "decode_batch": "rows.batch",
    "record": "sessions.manager",
    "replay": "sessions.manager",
}
_SUBMODULES = ("bridges", "metrics", "testing")


def __getattr__(name: str) -> Any:
    from importlib import import_module

    value: Any
    if name in _HOMES:
        value = getattr(import_module(f"r3patch.{_HOMES[name]}"), name)
    elif name in _SUBMODULES:
        value = import_module(f"r3patch.{name}")
    elif name == "__version__":
        from r3patch._version import version

        value = version()
    else:
        raise AttributeError(f"module 'r3patch' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not _config.CONFIG.disable:
    install()
