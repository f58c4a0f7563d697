"""ROLL: roll/third_party/megatron/router_replay_utils.py, called as megatron_strategy.py does."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from contract import Driver, Rollout
from loading import stub

NAME = "ROLL"
PACKAGE = "roll"
FOLDERS = ("ROLL",)
PATCHED = (False,)
FORKS: tuple[str, ...] = ()
PIPELINE = True
OWN_FAULTS = {"first layer dense": "columns are taken by the ordinal of a router"}


def open(checkout: Path, patched: bool) -> Driver:  # noqa: A001
    names = ("postprocess_packed_seqs", "preprocess_packed_seqs")  # of packed samples: not used
    stub("roll.third_party.megatron.util", **dict.fromkeys(names))
    return _Driver()


class _Driver(Driver):
    def __init__(self) -> None:
        self.replay = importlib.import_module("roll.third_party.megatron.router_replay_utils")

    def fill(self, chunk: Any, rollout: Rollout, tokens: Any) -> None:
        self.rollout = rollout
        action = self.replay.RouterReplayAction.REPLAY_FORWARD
        self.replay.RouterReplay.set_global_router_replay_action(action)

    def before(self, chunk: Any, microbatch: int) -> dict[str, Any]:
        helper, action = self.replay.RouterReplayHelper, self.replay.RouterReplayAction
        stage = chunk.vp_stage
        if helper.is_replay_backward_action(chunk.config, stage):
            for router in helper.get_micro_batch_router_list(chunk.config, stage):
                router.set_router_replay_action(action.REPLAY_FORWARD)
        if helper.is_replay_forward_action(chunk.config, stage):
            rows = self.rollout.padded(microbatch).to(torch.uint8)
            self.replay.set_router_replay_data(rows, None, chunk.config, stage)
        return {}

    def after(self, chunk: Any, microbatch: int) -> None:
        helper, action = self.replay.RouterReplayHelper, self.replay.RouterReplayAction
        if helper.is_replay_forward_action(chunk.config, chunk.vp_stage):
            for router in helper.get_micro_batch_router_list(chunk.config, chunk.vp_stage):
                router.set_router_replay_action(action.REPLAY_BACKWARD)
