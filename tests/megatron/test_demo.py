"""The demo, which is the first thing that people run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.megatron, pytest.mark.slow]


def test_the_demo_runs_to_its_end(tmp_path: Path) -> None:
    """One step of it: replay brings the differing rows to 0, and the report is written."""
    report = tmp_path / "demo.html"
    done = subprocess.run(
        [sys.executable, "-m", "r3patch", "demo", "--steps", "1", "-o", str(report)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (rows,) = [line for line in done.stdout.splitlines() if "rows trained unlike" in line]
    no_replay, replay, mtp_too = (float(word.rstrip("%")) for word in rows.split()[-3:])
    assert no_replay > 0 == replay == mtp_too
    assert "<html" in report.read_text(encoding="utf-8")
