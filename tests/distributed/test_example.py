"""The example runs as its docstring says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.megatron
@pytest.mark.distributed
@pytest.mark.slow
def test_two_pipeline_ranks_replay_and_print_every_step() -> None:
    """A line per step: losses, all main rows replayed, the MTP rows left alone."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(ROOT / "examples" / "train_glm47_flash.py"), "--steps", "2", "--recompute"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=150)
    finally:
        process.terminate()  # torchrun ends its ranks
        process.wait(30)
    assert process.returncode == 0, output[-4000:]
    found = re.findall(r"step (\d)  loss \d\.\d{4}  replayed (\d+) rows.*mtp (\d+) rows", output)
    assert found == [("0", "384", "128"), ("1", "384", "128")]
