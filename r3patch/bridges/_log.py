"""Log lines that are said once per install, however many routers there are."""

from __future__ import annotations

import logging

logger = logging.getLogger("r3patch.bridges")

_said: set[str] = set()


def log_once(text: str, level: int = logging.WARNING) -> None:
    """Log a line, unless it was logged since the last `forget_logged`."""
    if text not in _said:
        _said.add(text)
        logger.log(level, "%s", text)


def forget_logged() -> None:
    """Let every line be logged again."""
    _said.clear()
