"""The example runs as its docstring says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from r3patch import testing

ROOT = Path(__file__).parents[2]


@pytest.mark.megatron
@pytest.mark.distributed
@pytest.mark.slow
def test_two_pipeline_ranks_replay_and_print_every_step() -> None:
    """A line per step: losses, all main rows replayed, the MTP rows left alone."""
    script = ROOT / "examples" / "train_glm47_flash.py"
    status, output = testing.torchrun(script, "--steps", "2", "--recompute", timeout=150)
    assert status == 0, output[-4000:]
    found = re.findall(r"step (\d)  loss \d\.\d{4}  replayed (\d+) rows.*mtp (\d+) rows", output)
    assert found == [("0", "384", "128"), ("1", "384", "128")]
