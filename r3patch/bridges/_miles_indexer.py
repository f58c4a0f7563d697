"""miles: ``indexer_replay_manager``, which replays what sparse attention looks at.

Attention layers (GLM-5, DeepSeek-V4) register with it as routers do with the routing manager, MTP
layers among them, and streams are numbered by layer number: MTP's first layer, which has number 1
again, takes the column of decoder layer 1. What an MTP constructor has registered is taken out
when it is done, and the manager rests while such a module runs, by the same means as for a router.

A module that asks the manager without being registered is not found, and what is not built by
Megatron's MTP classes has no constructor to wait for.

Source: miles/utils/replay_base.py and miles_plugins/models/glm5/glm5.py, August 2026.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from r3patch.bridges import miles
from r3patch.bridges._shield import Shield

if TYPE_CHECKING:
    from types import ModuleType


def streams(module: ModuleType | None) -> list[Any]:
    """The streams that are registered now; none in a miles that has no such manager."""
    manager = getattr(module, "indexer_replay_manager", None)
    return list(getattr(manager, "replays", ()))


def exclude(owner: Any, known: list[Any], module: ModuleType) -> None:
    """Take out what was registered while `owner` was built.

    A module that existed before, such as a decoder layer that `owner` shares, keeps its stream,
    and so does what another thread built in the meantime.

    Args:
        owner: an MTP module whose constructor has returned.
        known: the streams before it.
        module: miles' replay_base.
    """
    before = {id(stream) for stream in known}
    born = {id(stream) for stream in streams(module)} - before
    if not born:
        return
    manager = module.indexer_replay_manager
    for part in owner.modules():
        if any(id(stream) in born for stream in miles.streams(part, manager).values()):
            miles.remove_streams(part, manager)
            Shield(rest, wake).cover(part)


def rest() -> str:
    """Stop the manager; gives the stage in which it was."""
    manager = sys.modules[miles.MODULE].indexer_replay_manager
    stage, manager.stage = manager.stage, miles.IDLE
    return str(stage)


def wake(stage: str) -> None:
    """Give the manager its stage back."""
    sys.modules[miles.MODULE].indexer_replay_manager.stage = stage
