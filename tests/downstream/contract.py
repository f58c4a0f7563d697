"""What drives a framework's replay code: declared here, one file for each framework in drivers/."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch


class Rollout(NamedTuple):
    """What the engine chose: the truth that every main call is held to."""

    experts: torch.Tensor
    """``[num_microbatches, num_tokens - 1, num_layers, topk] int64``, dense layers included: the
    last token of a sample was never fed to the engine."""
    num_experts: int

    def padded(self, microbatch: int) -> torch.Tensor:
        """``[1, num_tokens, num_layers, topk]``: the last row is the dummy ``0 .. topk - 1``."""
        rows = self.experts[microbatch]
        last = torch.arange(rows.shape[-1]).expand(1, *rows.shape[1:])
        return torch.cat([rows, last]).unsqueeze(0)


class Driver:
    """The calls that a framework's trainer makes, in its order; each driver overrides some."""

    settings: ClassVar[dict[str, Any]] = {"moe_enable_routing_replay": True}
    """Fields of the config that the framework sets."""

    def fill(self, chunk: Any, rollout: Rollout, tokens: list[torch.Tensor]) -> None:
        """Once the model is built, before the step. ``tokens``: ``[num_tokens]`` of each."""

    def before(self, chunk: Any, microbatch: int) -> dict[str, Any]:
        """In ``forward_step``, before the model is called; gives further arguments for it."""
        return {}

    def after(self, chunk: Any, microbatch: int) -> None:
        """In ``forward_step``, after it."""


class DriverModule(Protocol):
    """A file in drivers/."""

    NAME: str
    PACKAGE: str
    """Its top-level package, which can be imported while a cell runs."""
    FOLDERS: tuple[str, ...]
    """What a clone of it may be called."""
    PATCHED: tuple[bool, ...]
    """On stock Megatron, or with what the framework adds to Megatron's source, or both."""
    FORKS: tuple[str, ...]
    """What a clone of its fork of Megatron may be called, if it adds to Megatron by a fork."""
    PIPELINE: bool
    """Whether its code runs over two pipeline stages with MTP."""
    OWN_FAULTS: dict[str, str]
    """Models that it replays wrongly whoever leaves MTP out, and why: r3patch does not mend it."""
    open: Callable[[Path, bool], Driver]
    """Loads its files before the model is built; with its patch of Megatron's source, or not."""
