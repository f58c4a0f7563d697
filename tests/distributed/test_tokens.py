"""Tokens on two ranks: every one is compared once where it is embedded, and wrong ranks are told.

Run by torchrun, this file is a rank.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import r3patch
from r3patch import Layout, Routes, testing

LENGTH, BATCH, MICROBATCHES = 32, 2, 2
CASES: dict[str, dict[str, int]] = {
    "pp2": {"pipeline": 2},
    "vpp2": {"pipeline": 2, "virtual_pipeline": 2},  # a layer in each of four chunks
    "tp2_sp": {"tensor": 2},
    "cp2": {"context": 2},
}


def build() -> list[torch.nn.Module]:
    chunks = testing.tiny_model(num_layers=4, moe_layer_freq=[1, 1, 1, 1], num_moe_experts=16)
    testing.seed_parameters(chunks)
    return [chunk.train() for chunk in chunks]


def batches() -> list[dict[str, Any]]:
    return testing.random_batches(
        num_microbatches=MICROBATCHES, micro_batch_size=BATCH, seq_length=LENGTH
    )


def rollout() -> list[list[Routes]]:
    """What the whole model chooses in one process for each sample, with its tokens."""
    with testing.megatron_on_cpu():
        chunks = build()
        with r3patch.record(chunks) as recording:
            testing.train_step(chunks, batches(), forward_only=True)
    valid = torch.arange(LENGTH) < LENGTH - 1
    found = []
    for routes, batch in zip(recording.routes, batches(), strict=True):
        rows = [routes[torch.arange(LENGTH) * BATCH + sample] for sample in range(BATCH)]
        found.append(
            [
                Routes(r.experts, r.layers, valid, num_experts=16, tokens=tokens)
                for r, tokens in zip(rows, batch["input_ids"], strict=True)
            ]
        )
    return found


def run(tmp_path: Path, case: str, fault: str) -> tuple[int, str]:
    torch.save(rollout(), tmp_path / "rollout.pt")
    return testing.torchrun(__file__, case, fault, str(tmp_path))


@pytest.mark.megatron
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_token_is_compared_once(case: str, tmp_path: Path) -> None:
    """In a healthy run, over the ranks that embed them; nothing is told."""
    status, output = run(tmp_path, case, "none")
    assert status == 0, output[-6000:]
    checked = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert sum(checked) == MICROBATCHES * BATCH * (LENGTH - 1)
    assert (0 in checked) == (case in ("pp2", "vpp2")), "a later stage embeds nothing"
    assert "hardly are of these tokens" not in output


@pytest.mark.megatron
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "text"),
    [("tp2_sp", "those of tensor-parallel rank 0"), ("cp2", "another rank's routes")],
)
def test_rows_of_another_rank_are_told(case: str, text: str, tmp_path: Path) -> None:
    """Rank 1 has the rows of rank 0: as many, of the same samples."""
    status, output = run(tmp_path, case, "rank")
    assert status != 0
    assert "ReplayError: microbatch 0, row 0" in output
    assert text in output


@pytest.mark.megatron
@pytest.mark.distributed
@pytest.mark.slow
def test_microbatches_in_another_order_are_told_under_virtual_stages(tmp_path: Path) -> None:
    """The schedule interleaves the passes of the chunks; the one that embeds them says it."""
    status, output = run(tmp_path, "vpp2", "order")
    assert status != 0
    assert "ReplayError: microbatch 0, row 0" in output
    assert "got the tokens of microbatch 1" in output


def rank_main(case: str, fault: str, folder: Path) -> None:
    samples: list[list[Routes]] = torch.load(folder / "rollout.pt", weights_only=False)
    with testing.megatron_on_cpu(**CASES[case]):
        chunks = build()
        layout = Layout.from_megatron(chunks[0].config, packed=False, seq_length=LENGTH)
        if fault == "rank":
            layout = dataclasses.replace(layout, tp_rank=0, cp_rank=0)
        placed = [layout.place(part) for part in samples]
        if fault == "order":
            placed.reverse()
        with r3patch.replay(chunks, placed) as session:
            testing.train_step(chunks, batches())
        checked = sum(check.checked for check in session.stats.token_checks)
        torch.save(checked, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rank_main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
