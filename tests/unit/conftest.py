"""Fresh interpreters for tests in which the order of imports matters."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FAKES = Path(__file__).parent / "fake_megatron"


@pytest.fixture(scope="session")
def _forkserver() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, str(FAKES / "forkserver.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        yield server
        assert server.stdin is not None
        server.stdin.close()


@pytest.fixture
def fresh(_forkserver: subprocess.Popen[str]) -> Callable[..., str]:
    """Runs a snippet in a fresh interpreter next to a fake megatron; gives back what it wrote.

    The test fails if the snippet raises. `first` goes before the fake on ``sys.path``.
    """

    def run(code: str, generation: str = "v017", first: Path | None = None, **env: str) -> str:
        path = [*([first] if first else []), FAKES / generation, FAKES]
        job = {"code": textwrap.dedent(code), "path": [str(p) for p in path], "env": env}
        assert _forkserver.stdin is not None
        assert _forkserver.stdout is not None
        _forkserver.stdin.write(json.dumps(job) + "\n")
        _forkserver.stdin.flush()
        status, text = json.loads(_forkserver.stdout.readline())
        assert status == 0, text
        return str(text)

    return run
