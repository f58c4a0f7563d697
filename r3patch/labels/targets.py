"""What of Megatron is patched, and why: data, on one screen.

Nothing here imports Megatron: a target is a name, and is looked up where Megatron is imported.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from r3patch.labels.scope import MTP


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


ROUTER_MODULE = "megatron.core.transformer.moe.router"
MTP_MODULE = "megatron.core.transformer.multi_token_prediction"

#: Everything of Megatron that `r3patch.install` touches. Deliberately not here: any ``forward``,
#: ``routing`` or top-k function (see _patch), and the MTP *specs*, which build no module and share
#: their layer spec with the last decoder layer.
#: Source: the classes and module paths are the same in megatron-core 0.12.3 to 0.19.2.
TARGETS = (
    Target(
        ROUTER_MODULE,
        "TopKRouter",
        None,
        "every router that replay can reach is one or derives from it (InferenceTopKRouter)",
    ),
    Target(
        MTP_MODULE,
        "MultiTokenPredictionBlock",
        MTP,
        "all MTP depths are built in it, subclasses and hybrid stacks included",
    ),
    Target(
        MTP_MODULE,
        "MultiTokenPredictionLayer",
        MTP,
        "frameworks build single layers of it without the block",
    ),
)


def megatron_version() -> str:
    """For messages only: what Megatron can do is found by looking, never by version.

    That of the module which this process has imported: the path may hold another distribution, and
    a source tree none.
    """
    return str(getattr(sys.modules.get("megatron.core"), "__version__", "of unknown version"))


def megatron_found() -> str:
    """Which Megatron a message speaks of: version and folder."""
    paths = list(getattr(sys.modules.get("megatron.core"), "__path__", []))
    where = f" in {paths[0]}" if paths else ""
    return f"megatron-core {megatron_version()}{where}"
