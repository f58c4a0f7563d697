"""torchrun's ranks have r3patch without a line of code, by `r3patch auto on` and `r3patch run`."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from environment import LOOK, Environment

pytest.importorskip("torch")

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("way", ["auto", "run"])
def test_both_ranks_of_torchrun_have_r3patch(tmp_path: Path, way: str) -> None:
    """Each of the launcher's two processes; the launcher has no Megatron, and no r3patch."""
    environment = Environment(tmp_path)
    (tmp_path / "train.py").write_text(LOOK)
    # Behind the environment's own, where an empty Megatron and r3patch are.
    (environment.site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    before = () if way == "auto" else ("-m", "r3patch", "run", environment.python)
    if way == "auto":
        on = environment.r3patch("auto", "on")
        assert on.returncode == 0, on.stderr
    done = environment.run(*before, *LAUNCH, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["False True"] * 2
