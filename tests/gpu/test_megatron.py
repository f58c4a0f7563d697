"""The claims of tests/megatron about recompute hold on the card: the same tests, run there.

On CUDA a recompute runs in autograd's worker thread, and Megatron keeps and restores the random
state of the device.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.usefixtures("cpu")]

sys.path.append(str(Path(__file__).parents[1] / "megatron"))
for _file in ("test_checkpoints", "test_recompute"):
    _tests = vars(importlib.import_module(_file)).items()
    globals().update({name: test for name, test in _tests if name.startswith("test_")})
