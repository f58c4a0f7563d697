"""Stock Megatron on the CPU, once per file that asks for it by ``usefixtures("cpu")``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from r3patch import testing


@pytest.fixture(scope="module")
def cpu() -> Iterator[None]:
    with testing.megatron_on_cpu():
        yield
