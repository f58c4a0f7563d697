"""The frameworks' own code: collected with ``--checkouts FOLDER`` only, one clone each in it."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--checkouts", type=Path, help="the folder of the frameworks' clones")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if config.getoption("--checkouts", default=None) else True


@pytest.fixture(scope="session")
def checkouts(pytestconfig: pytest.Config) -> Path:
    folder: Path = pytestconfig.getoption("--checkouts").resolve()
    return folder
