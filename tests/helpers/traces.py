"""A trace that is switched on, what goes into it, and a reader as other languages have it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from r3patch import _config
from r3patch.observe import trace
from r3patch.observe.stats import Agreement, ReplayStats, RouterStats, TokenCheck


def switch_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of rank 0 in a folder that is yet to be made."""
    base = folder / "runs" / "run.jsonl"
    config = dataclasses.replace(_config.CONFIG, trace=str(base))
    monkeypatch.setattr(_config, "CONFIG", config)
    monkeypatch.setattr(trace, "_lost", 0)
    monkeypatch.setattr(trace, "_full", False)
    return base.with_name("run.rank0.jsonl")


def strict(line: str | bytes) -> Any:
    """json.loads as other languages have it: without NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(line, parse_constant=refuse)


def some_stats() -> ReplayStats:
    main = RouterStats(
        "decoder.layers.1.mlp.router",
        0,
        "main",
        2,
        forward_calls=3,
        recompute_calls=3,
        rows_replayed=90,
        rows_live=6,
        topk=4,
        rows_measured=90,
        rows_differing=9,
        experts_shared=351,
    )
    mtp = RouterStats("mtp.layers.0.router", 0, "mtp", 1, forward_calls=3, rows_live=96)
    return ReplayStats(
        (main, mtp),
        tokens=bytes([0, 1, 1, 2]),
        seconds=0.25,
        token_checks=(TokenCheck(0, 30, "", 2),),
        first_rows=Agreement(64, 256, 208, 64),
    )
