"""Stock Megatron on the CPU, once per file that asks for it; and nobody passes an alarm by."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import tiny

from r3patch import testing

ALARM = "r3patch.sessions._alarm"


@pytest.fixture(scope="module")
def cpu() -> Iterator[None]:
    with testing.megatron_on_cpu():
        yield


class Heard(logging.Handler):
    """The alarms of a test."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture(autouse=True)
def no_false_alarm(request: pytest.FixtureRequest) -> Iterator[None]:
    """A healthy session is silent, in every test: the alarm may ring for foreign routes only.

    Those of `tiny.random_routes` are foreign; tests that make others say so by the marker.
    """
    foreign = tiny.Foreign.made
    heard = Heard()
    logging.getLogger(ALARM).addHandler(heard)
    try:
        yield
    finally:
        logging.getLogger(ALARM).removeHandler(heard)
    if tiny.Foreign.made == foreign and not request.node.get_closest_marker("foreign_routes"):
        assert not heard.texts, f"the alarm rang in a healthy session: {heard.texts[0]}"
