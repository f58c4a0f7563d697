"""What `rollout.py` and `serve.py` wrote, replayed in stock Megatron: asserted, a line each.

    python tools/engine/replay.py PAYLOADS CHECKPOINTS    # in an environment with Megatron

Rows of the table of `make engine`, in Markdown, under `HEAD`.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import oracle

from r3patch import testing

CUTS = ({"pipeline": 2}, {"tensor": 2})


def main(payloads: Path, checkpoints: Path) -> None:
    files = sorted(payloads.glob("*.json"))
    found = {file: replayed(file, checkpoints) for file in files}
    in_fp32 = [file for file in files if file.stem.endswith("_float32")]
    for cut in CUTS:
        oracle.assert_on_two_ranks(in_fp32, checkpoints, cut, [found[file][1] for file in in_fp32])
    for line, _ in found.values():
        print(line)


def replayed(file: Path, checkpoints: Path) -> tuple[str, oracle.Trained]:
    """Forward, forward and backward, and both under full recompute, in one process."""
    rollout, checkpoint = oracle.read_for(file, checkpoints)
    with testing.megatron_on_cpu():
        found = oracle.compare(rollout, testing.load_hf(checkpoint, **rollout.overrides))
        plain, recomputed = (
            oracle.train(rollout, testing.load_hf(checkpoint, **rollout.overrides, **recompute))
            for recompute in ({}, oracle.FULL_RECOMPUTE)
        )
    check(rollout, found)
    assert found.mtp_replayed == plain.mtp_replayed == recomputed.mtp_replayed == 0
    # Not to the bit: the no-grad pass of Megatron 0.18 and newer does not sort a row's ids.
    pairs = zip(plain.losses, recomputed.losses, strict=True)
    assert max(abs(one - other) for one, other in pairs) < 1e-5, (plain.losses, recomputed.losses)
    assert recomputed.recompute_calls > 0
    assert recomputed.rows_differing_in_recompute == 0
    return line(rollout, found, via="HTTP" if "http" in file.stem else "offline"), recomputed


def check(rollout: oracle.Rollout, found: oracle.Figures) -> None:
    """In fp32 the engine is Megatron; in bf16 its rows bring Megatron nearer."""
    differ, alone, replayed = found.routes.rows_differing, found.gap, found.gap_replayed
    if rollout.contents["dtype"] == "float32":
        assert sum(differ) == 0, f"{sum(differ)} rows differ in fp32"
        assert max(alone.max_abs, replayed.max_abs) < 1e-4, "log-probabilities differ in fp32"
    else:
        assert replayed.k3 < alone.k3, "replay did not bring the policies together"


def line(rollout: oracle.Rollout, found: oracle.Figures, via: str) -> str:
    contents, alone, after = rollout.contents, found.gap, found.gap_replayed
    cells = (
        metadata.version("megatron-core"),
        contents["model_type"],
        f"{contents['dtype']}, {via}",
        f"{len(rollout.samples)}",
        f"{sum(found.routes.rows):,}",
        f"{found.routes.mismatch:.2%}",
        f"{alone.max_abs:.1e} / {after.max_abs:.1e}",
        f"{alone.k3:.1e} / {after.k3:.1e}",
        f"{found.mtp_replayed}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
