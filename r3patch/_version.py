"""The version of the installed distribution."""

from __future__ import annotations


def version() -> str:
    """``0+unknown`` for a source tree on PYTHONPATH."""
    from importlib import metadata  # tens of milliseconds that most imports need not spend

    try:
        return metadata.version("r3patch")
    except metadata.PackageNotFoundError:
        return "0+unknown"
