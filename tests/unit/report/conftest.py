"""Runs whose traces are known to the row, written by the library's own writer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from r3patch import Routes, _config, cli
from r3patch.metrics import route_mismatch
from r3patch.observe import trace as writer
from r3patch.observe.history import History, load
from r3patch.observe.stats import ReplayStats, RouterStats

LAYERS, NUM_TOKENS, NUM_EXPERTS, TOPK = (2, 3, 4, 5), 64, 16, 4
STEPS = range(6)


class Run:
    """A run in a folder: what its sessions counted, its trace, and the page of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base, self._monkeypatch = folder / "run.jsonl", monkeypatch
        config = dataclasses.replace(_config.CONFIG, trace=str(self.base))
        monkeypatch.setattr(_config, "CONFIG", config)
        monkeypatch.setattr(writer, "_lost", 0)

    def rollout(self, step: int, shift: int = 0) -> Routes:
        """What the model of a step would choose, all but exactly; shifted by layers if asked to."""
        generator = torch.Generator().manual_seed(step)
        scores = torch.randn(NUM_TOKENS, len(LAYERS), NUM_EXPERTS, generator=generator)
        experts = scores.topk(TOPK).indices.roll(shift, dims=1)
        return Routes(experts, LAYERS, num_experts=NUM_EXPERTS)

    def live(self, step: int) -> Routes:
        """The trainer's own choice: the rollout's, but for one expert in every eighth row."""
        experts = self.rollout(step).experts.long()
        absent = torch.tensor(
            [[next(e for e in range(NUM_EXPERTS) if e not in row) for row in t] for t in experts]
        )
        experts[::8, :, 0] = absent[::8]
        return Routes(experts, LAYERS, num_experts=NUM_EXPERTS)

    def stats(
        self, step: int, given: Routes | None = None, *, without: int | None = None, **mtp: int
    ) -> ReplayStats:
        """What a measured session counts that replays `given`; `without` is an orphaned layer."""
        found = route_mismatch(given or self.rollout(step), self.live(step))
        routers = []
        for place, layer in enumerate(LAYERS):
            name = f"decoder.layers.{layer - 1}.mlp.router"
            counts: dict[str, Any] = {
                "forward_calls": 2,
                "recompute_calls": 2,
                "rows_replayed": NUM_TOKENS,
                "rows_live": 8,
                "rows_measured": NUM_TOKENS,
                "rows_differing": found.rows_differing[place],
                "experts_shared": found.experts_shared[place],
                "recompute_rows_measured": NUM_TOKENS,
            }
            if layer == without:
                counts = {}
            routers.append(RouterStats(name, 0, "main", layer, topk=TOPK, **counts))
        left: dict[str, Any] = {"forward_calls": 2, "rows_live": 72, **mtp}
        routers.append(RouterStats("mtp.layers.0.mlp.router", 0, "mtp", 1, topk=TOPK, **left))
        tokens = bytes([2] * found.tokens_differing + [1] * (found.tokens - found.tokens_differing))
        return ReplayStats(tuple(routers), tokens, seconds=0.002)

    def healthy(self, **changes: Any) -> list[dict[str, Any]]:
        return [{"step": step, "stats": self.stats(step), **changes} for step in STEPS]

    def trace(self, sessions: list[dict[str, Any]]) -> History:
        """Write sessions, in order, by the rank and the process that they name; read them back."""
        for session in map(dict, sessions):
            rank = session.pop("rank", 0)
            self._monkeypatch.setattr(writer, "_rank", lambda rank=rank: rank)
            self._monkeypatch.setattr(writer, "_process", session.pop("process", "first"))
            writer.write(writer.session(session.pop("kind", "replay"), **session))
        return load([str(self.base)])

    def page(self, *options: str, status: int = 0) -> str:
        """The page of what was traced, and the exit status that its verdict gives."""
        pytest.importorskip("matplotlib")
        output = self.base.with_name("report.html")
        assert cli.main(["report", str(self.base), "-o", str(output), *options]) == status
        return output.read_text()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)
