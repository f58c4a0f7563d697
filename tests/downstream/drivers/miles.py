"""miles: its manager and its fill of rollout rows, called as its actor does."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from contract import Driver, Rollout
from loading import stub
from samples import Samples

NAME = "miles"
PACKAGE = "miles"
FOLDERS = ("miles",)
PATCHED = (False, True)
FORKS = ("Megatron-LM-miles",)
PIPELINE = True
OWN_FAULTS: dict[str, str] = {}


def open(checkout: Path, patched: bool) -> Driver:  # noqa: A001
    one = SimpleNamespace(rank=0, size=1)
    state = SimpleNamespace(tp=one, cp=one)
    stub("miles.backends.training_utils.parallel", get_parallel_state=lambda: state)
    return _Driver(on_fork=patched)


class _Driver(Driver):
    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, *, on_fork: bool) -> None:
        self.on_fork = on_fork
        self.base = importlib.import_module("miles.utils.replay_base")
        self.data = importlib.import_module("miles.backends.training_utils.replay_data")
        self.layers = importlib.import_module("miles.backends.megatron_utils.replay_utils")
        self.manager = self.base.routing_replay_manager
        self.manager.enabled = True

    def fill(self, chunk: Any, rollout: Rollout, tokens: list[torch.Tensor]) -> None:
        self.tokens = tokens
        self.data.fill_replay_data(
            args=SimpleNamespace(qkv_format="thd", allgather_cp=False, data_pad_size_multiplier=1),
            models=[SimpleNamespace(module=chunk)],
            data_iterator=[Samples(self.manager.data_key, rollout, tokens)],
            num_microbatches=[len(tokens)],
            rollout_data={self.manager.data_key: list(rollout.experts)},
            data_key=self.manager.data_key,
            replay_list=self.manager.replays,
            register_replay_list_func=self.layers.register_replay_list_moe,
            if_sp_region=self.manager.if_sp_region,
        )
        self.manager.stage = "replay_backward"

    def before(self, chunk: Any, microbatch: int) -> dict[str, Any]:
        self.manager.stage = "replay_forward"
        # The fork runs MTP where it is given labels, which miles does to train it.
        labels = self.tokens[microbatch].unsqueeze(0)
        return {"mtp_kwargs": {"mtp_labels": labels}} if self.on_fork else {}

    def after(self, chunk: Any, microbatch: int) -> None:
        self.manager.stage = "replay_backward"
