"""A pytest plugin under which Megatron's own unit tests run on a CPU, as far as they can.

It stands below Megatron's conftest: NCCL is gloo, CUDA is the CPU and said to be there, no test
data is fetched. What needs Transformer Engine or a real device fails or is skipped, with r3patch
and without.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from r3patch.testing import _cpu

_stack = contextlib.ExitStack()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    download: Any = ModuleType("download_unit_tests_dataset")
    download.download_and_extract_asset = lambda **where: None
    sys.modules["tests.test_utils.python_scripts.download_unit_tests_dataset"] = download
    for module in ("megatron.core.models.gpt", "megatron.training.argument_utils"):
        with contextlib.suppress(ImportError):  # older releases have no such module
            importlib.import_module(module)  # before CUDA is said to be there: kernels ask for it
    initialize = torch.distributed.init_process_group

    def over_gloo(backend: Any = None, *args: Any, **kwargs: Any) -> None:
        initialize("gloo", *args, **kwargs)

    for context in (
        _cpu._cuda_stubs(),
        _cpu._CudaIsCpu(),
        _cpu._megatron_stubs(),
        _cpu._replaced(torch.cuda, device_count=lambda: 1, is_available=lambda: True),
        _cpu._replaced(torch.distributed, init_process_group=over_gloo),
    ):
        _stack.enter_context(context)


def pytest_unconfigure(config: pytest.Config) -> None:
    _stack.close()
