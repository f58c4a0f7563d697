"""verl: verl/utils/megatron/router_replay_{patch,utils}.py, called as its MegatronEngine does."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from contract import Driver, Rollout
from loading import stub

NAME = "verl"
PACKAGE = "verl"
FOLDERS = ("verl",)
PATCHED = (False,)
FORKS: tuple[str, ...] = ()
PIPELINE = True
OWN_FAULTS: dict[str, str] = {}


def open(checkout: Path, patched: bool) -> Driver:  # noqa: A001
    stub("verl.utils.device", get_device_name=lambda: "cpu", is_npu_available=False)
    stub("verl.utils.model", CausalLMOutputForPPO=object)
    return _Driver()


class _Driver(Driver):
    def __init__(self) -> None:
        self.patch = importlib.import_module("verl.utils.megatron.router_replay_patch")
        self.patch.apply_router_replay_patch()
        self.replay = importlib.import_module("verl.utils.megatron.router_replay_utils")

    def fill(self, chunk: Any, rollout: Rollout, tokens: list[torch.Tensor]) -> None:
        self.rollout, self.tokens = rollout, tokens
        action = self.patch.RouterReplayAction.REPLAY_FORWARD
        self.patch.RouterReplay.set_global_router_replay_action(action)

    def before(self, chunk: Any, microbatch: int) -> dict[str, Any]:
        helper = self.replay.RouterReplayHelper
        if helper.is_replay_backward_action(chunk.config, chunk.vp_stage):
            self._turn(chunk, self.patch.RouterReplayAction.REPLAY_FORWARD)
        if helper.is_replay_forward_action(chunk.config, chunk.vp_stage):
            tokens = _jagged(self.tokens[microbatch])
            rows = _jagged(self.rollout.experts[microbatch])
            self.replay.set_router_replay_data(
                self.replay.align_r3_router_replay_data(rows, tokens),
                None,
                chunk.config,
                chunk.vp_stage,
                replay_mask=self.replay.build_r3_replay_mask(tokens, torch.ones(1, 4)),
                model=chunk,
            )
        return {}

    def after(self, chunk: Any, microbatch: int) -> None:
        if self.replay.RouterReplayHelper.is_replay_forward_action(chunk.config, chunk.vp_stage):
            self._turn(chunk, self.patch.RouterReplayAction.REPLAY_BACKWARD)

    def _turn(self, chunk: Any, action: Any) -> None:
        helper = self.replay.RouterReplayHelper
        for router in helper.get_micro_batch_router_list(chunk.config, chunk.vp_stage):
            router.set_router_replay_action(action)
        self.replay.set_model_router_replay_action(chunk, action)


def _jagged(sample: torch.Tensor) -> torch.Tensor:
    return torch.nested.as_nested_tensor([sample], layout=torch.jagged)
