"""ms-swift: swift/megatron/utils/router_replay_utils.py, called as its GRPO trainer does."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

from contract import Driver, Rollout
from loading import stub

NAME = "ms-swift"
PACKAGE = "swift"
FOLDERS = ("ms-swift",)
PATCHED = (False,)
FORKS: tuple[str, ...] = ()
PIPELINE = True
OWN_FAULTS: dict[str, str] = {}


def open(checkout: Path, patched: bool) -> Driver:  # noqa: A001
    stub("mcore_bridge", split_cp_inputs=None)
    stub("swift.utils", get_logger=logging.getLogger)
    stub("swift.utils.torch_utils", get_current_device=lambda: "cpu")
    return _Driver()


class _Driver(Driver):
    def __init__(self) -> None:
        self.replay = importlib.import_module("swift.megatron.utils.router_replay_utils")
        self.replay.apply_router_replay_patch()

    def fill(self, chunk: Any, rollout: Rollout, tokens: Any) -> None:
        self.rollout = rollout
        self._all(self.replay.RouterReplayAction.REPLAY_FORWARD)

    def before(self, chunk: Any, microbatch: int) -> dict[str, Any]:
        helper, action = self.replay.RouterReplayHelper, self.replay.RouterReplayAction
        if helper.is_replay_backward_action(chunk.config):
            for router in helper.get_micro_batch_router_list(chunk.config):
                router.set_router_replay_action(action.REPLAY_FORWARD)
        if helper.is_replay_forward_action(chunk.config):
            rows = self.replay.get_local_topk_idx_for_current_rank(
                self.rollout.padded(microbatch), chunk.config
            )
            self.replay.set_router_replay_data(rows, chunk.config)
        return {}

    def after(self, chunk: Any, microbatch: int) -> None:
        helper, action = self.replay.RouterReplayHelper, self.replay.RouterReplayAction
        if helper.is_replay_forward_action(chunk.config):
            for router in helper.get_micro_batch_router_list(chunk.config):
                router.set_router_replay_action(action.REPLAY_BACKWARD)

    def _all(self, action: Any) -> None:
        self.replay.RouterReplay.set_global_router_replay_action(action)
