"""SkyRL: skyrl/backends/skyrl_train/utils/replay_utils.py, called as its model wrapper does."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from contract import Driver, Rollout

NAME = "SkyRL"
PACKAGE = "skyrl"
FOLDERS = ("SkyRL",)
PATCHED = (False,)
FORKS: tuple[str, ...] = ()
PIPELINE = False  # its worker asserts it of MTP
OWN_FAULTS: dict[str, str] = {}


def open(checkout: Path, patched: bool) -> Driver:  # noqa: A001
    return _Driver()


class _Driver(Driver):
    def __init__(self) -> None:
        train = "skyrl.backends.skyrl_train"
        self.replay = importlib.import_module(f"{train}.utils.replay_utils")
        self.layouts = importlib.import_module(f"{train}.distributed.megatron.token_metadata")
        self.replay.patch_topk_router_layer_number()
        self.replay.patch_topk_router_expert_bias_padding_mask()

    def fill(self, chunk: Any, rollout: Rollout, tokens: Any) -> None:
        self.rollout = rollout

    def before(self, chunk: Any, microbatch: int) -> dict[str, Any]:
        rows = self.rollout.padded(microbatch)
        attention_mask = torch.ones(rows.shape[:2], dtype=torch.bool)
        uncaptured = torch.zeros(rows.shape[:2], dtype=torch.bool)
        uncaptured[:, -1] = True
        layout = self.layouts.build_token_metadata_layout(
            attention_mask, torch.device("cpu"), packed=False, fp8_enabled=False
        )
        more: dict[str, Any] = self.replay.setup_per_microbatch_replay_forward(
            rows.to(torch.uint8), uncaptured, attention_mask, chunk, chunk.config, layout
        )
        return more

    def after(self, chunk: Any, microbatch: int) -> None:
        self.replay.setup_per_microbatch_replay_backward()
