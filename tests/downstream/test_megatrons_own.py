"""Megatron's own unit tests of routers and MTP, with r3patch imported and without."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytestmark = [pytest.mark.megatron, pytest.mark.slow]

HERE = Path(__file__).parent
#: What a CPU gets through in minutes. `moe/test_routers.py` and `moe/test_aux_loss.py` do not end.
TESTS = (
    "moe/test_moe_layer.py",
    "moe/test_router_replay.py",
    "moe/test_router_trace.py",
    "moe/test_shared_experts.py",
    "test_multi_token_prediction.py",
    "test_transformer_block.py",
)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def outcomes(megatron: Path, report: Path, *, governed: bool) -> dict[str, str]:
    """By test: passed, or what it did instead. Most need a GPU, and fail or skip on a CPU."""
    folder = megatron / "tests/unit_tests/transformer"
    files = [str(folder / name) for name in TESTS if (folder / name.partition("::")[0]).exists()]
    environment = {
        **os.environ,
        "R3PATCH_DISABLE": str(int(not governed)),
        "PYTHONPATH": os.pathsep.join(
            [str(megatron), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "PYTHONSAFEPATH": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    plugins = ("-p", "megatron_cpu", "-p", "no:cacheprovider")
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, f"--junitxml={report}", *files],
        cwd=megatron,
        env=environment,
        check=False,
        stdout=subprocess.DEVNULL,
    )
    found = {}
    for case in ET.parse(report).iter("testcase"):
        reasons = [child for child in case if child.tag in {"failure", "error", "skipped"}]
        kind = ", ".join(f"{child.tag}: {child.get('message')}" for child in reasons) or "passed"
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = re.sub(r"0x[0-9a-f]+", "0x...", kind)  # addresses differ in any two runs
    return found


def test_the_import_changes_no_outcome(checkouts: Path, tmp_path: Path) -> None:
    """Every test passes, fails or is skipped for the same reason, with the import and without."""
    megatron = checkouts / "Megatron-LM"
    if not megatron.is_dir():
        pytest.skip("no clone of Megatron-LM")
    without = outcomes(megatron, tmp_path / "without.xml", governed=False)
    governed = outcomes(megatron, tmp_path / "with.xml", governed=True)
    assert list(without.values()).count("passed") > 10
    assert governed.keys() == without.keys()
    different = {
        name: (outcome, governed[name])
        for name, outcome in without.items()
        if governed[name] != outcome
    }
    assert not different
