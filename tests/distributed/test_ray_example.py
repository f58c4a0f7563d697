"""The example under Ray, against recorded answers of vLLM's server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import recorded

#: Ray starts its workers with niceness 15: beside another busy test they would not move.
RAY = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
EXAMPLE = Path(__file__).parents[2] / "examples" / "vllm_to_ray.py"


@pytest.mark.megatron
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.feature("module:ray:init")
def test_two_trainers_get_the_rows_of_their_stage(tmp_path: Path) -> None:
    """Over HTTP, joined, placed and sent: in fp32 no row differs from the model's own choice."""
    checkpoint = checkpoints.write(tmp_path, "qwen3_moe")
    with recorded.server() as url:
        done = subprocess.run(
            [sys.executable, EXAMPLE, "--url", url, "--checkpoint", checkpoint, "--steps=2"],
            env={**os.environ, **RAY},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    answers = [*recorded.exchanges("n=2"), recorded.exchanges("multi-turn")[-1]]
    choices = [choice for answer in answers for choice in answer["response"]["choices"]]
    rows = 4 * sum(len(c["prompt_token_ids"]) + len(c["token_ids"]) - 1 for c in choices)
    found = re.findall(
        r"step (\d)  (\d+) rows replayed, (\d+) otherwise than live  mtp (\d+)  "
        r"log-probs differ by at most (\S+)",
        done.stdout,
    )
    assert [line[:4] for line in found] == [("0", str(rows), "0", "0"), ("1", str(rows), "0", "0")]
    assert all(0 < float(line[4]) < 1e-4 for line in found)
