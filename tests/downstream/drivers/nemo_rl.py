"""NeMo-RL: nemo_rl/models/megatron/router_replay.py, called as train.py does."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from contract import Driver, Rollout
from loading import stub

NAME = "NeMo-RL"
PACKAGE = "nemo_rl"
FOLDERS = ("RL", "NeMo-RL")
PATCHED = (False,)
FORKS: tuple[str, ...] = ()
PIPELINE = True
OWN_FAULTS: dict[str, str] = {}


def open(checkout: Path, patched: bool) -> Driver:  # noqa: A001
    stub("nemo_rl.models.generation.interfaces", ROUTED_EXPERTS_MISSING_ROUTE_SENTINEL=-1)
    stub("nemo_rl.models.policy", PolicyConfig=dict)
    return _Driver()


class _Driver(Driver):
    def __init__(self) -> None:
        self.replay = importlib.import_module("nemo_rl.models.megatron.router_replay")

    def fill(self, chunk: Any, rollout: Rollout, tokens: Any) -> None:
        self.rollout = rollout

    def before(self, chunk: Any, microbatch: int) -> dict[str, Any]:
        self.replay.set_router_replay_forward(chunk, self.rollout.padded(microbatch))
        return {}

    def after(self, chunk: Any, microbatch: int) -> None:
        self.replay.set_router_replay_backward(chunk)
