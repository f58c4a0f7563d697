"""Saved rows are read, checked and compared without torch, as with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import routes

from r3patch import Routes, RoutesError
from r3patch.metrics import expert_load, route_mismatch
from r3patch.rows import files

pytest.importorskip("rich")
_selection = pytest.importorskip("r3patch.cli._selection")

RUN = """
import sys
sys.modules["torch"] = None
from r3patch import cli
print("status", cli.main(["inspect", *sys.argv[1:]]))
"""


def inspect(*paths: Path) -> str:
    command = [sys.executable, "-c", RUN, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return " ".join((done.stdout + done.stderr).split())


def rows(seed: int, *, tokens: int = 64, gaps: bool = True) -> Routes:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(tokens, 3, 8, generator=generator).topk(2).indices
    valid = torch.rand(tokens, 3, generator=generator) > 0.2 if gaps else None
    ids = torch.arange(tokens) + seed
    return Routes(experts, (2, 3, 5), valid, num_experts=8, tokens=ids)


def test_a_file_is_shown_and_two_are_compared(tmp_path: Path) -> None:
    """Where only the training machine has torch: one file, two equal ones, two that differ."""
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    rows(1).save(a)
    rows(2).save(b)
    shown = inspect(a)
    assert "top-2 of 8" in shown
    assert "token ids 64 of 64" in shown
    assert shown.endswith("status 0")
    assert inspect(a, a).endswith("status 0")
    compared = inspect(a, b)
    assert "64 of 64 token ids are others." in compared
    assert compared.endswith("status 1")


def test_a_file_that_only_torch_reads_says_so(tmp_path: Path) -> None:
    """Files of r3patch 0.1: what it is, and what to do about it."""
    part = rows(1)
    state = {"format": "r3patch.Routes", "version": 1, "layers": [2, 3, 5], "num_experts": 8}
    torch.save(state | {"experts": part.experts, "valid": part.valid}, tmp_path / "old.pt")
    told = inspect(tmp_path / "old.pt")
    assert told.startswith("status 1 r3patch inspect: ")
    assert "only torch reads those" in told
    assert "Routes.load(path).save(path)" in told


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 64])
def test_the_arithmetic_is_that_of_metrics(tokens: int, gaps: bool) -> None:
    """Load, overlap and mismatch by layer and over all, rows without routes included."""
    a, b = rows(1, tokens=tokens, gaps=gaps), rows(2, tokens=tokens, gaps=gaps)
    want = route_mismatch(a, b)
    ours = _selection.Selection.of(a)
    found = _selection.compare(ours, _selection.Selection.of(b))
    assert (tuple(found.rows), tuple(found.differing)) == (want.rows, want.rows_differing)
    assert (found.tokens, found.tokens_differing) == (want.tokens, want.tokens_differing)
    np.testing.assert_equal(
        [*found.overlaps, found.overlap], [*want.overlap_by_layer, want.overlap]
    )
    assert ours.load().tolist() == expert_load(a).real.tolist()


CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a repeated id": {"experts": torch.zeros(3, 3, 2, dtype=torch.uint8)},
    "an id that is none": {"experts": torch.tensor([0, 8], dtype=torch.uint8).expand(3, 3, 2)},
    "a row of -1": {"experts": torch.full((3, 3, 2), -1, dtype=torch.int16)},
    "ids that are no integers": {"experts": torch.zeros(3, 3, 2)},
    "two axes": {"experts": torch.zeros(3, 3, dtype=torch.uint8)},
    "one layer too many": {"layers": [2, 3, 5, 6]},
    "a layer twice": {"layers": [2, 3, 3]},
    "no layers": {"layers": None},
    "experts as text": {"num_experts": "8"},
    "fewer experts": {"num_experts": 1},
    "flags that are numbers": {"valid": torch.ones(3, 3, dtype=torch.uint8)},
    "flags of other tokens": {"valid": torch.ones(4, dtype=torch.bool)},
    "a flag for each token": {"valid": torch.tensor([True, False, True])},
    "tokens of others": {"tokens": torch.arange(4, dtype=torch.int32)},
    "tokens that are no ids": {"tokens": torch.ones(3)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_is_refused_where_routes_refuse_it(change: str, tmp_path: Path) -> None:
    """And is the same rows where they take it."""
    part = routes(3)
    held = {"layers": part.layers, "num_experts": 8, "experts": part.experts} | CHANGES[change]
    files.write(tmp_path / "x", files.Contents(**held))
    try:
        want = Routes.load(tmp_path / "x")
    except RoutesError:
        with pytest.raises(RoutesError, match="x is damaged: "):
            _selection.Selection.read(tmp_path / "x")
        return
    found = _selection.Selection.read(tmp_path / "x")
    assert found.valid.tolist() == want.mask.tolist()
    assert (found.experts * found.valid[..., None]).tolist() == want.experts.tolist()
