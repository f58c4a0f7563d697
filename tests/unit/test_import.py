"""``import r3patch``: what it takes with it, and what it offers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import r3patch


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("R3PATCH_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**clean, **env},
    )


@pytest.mark.wheel
def test_what_is_tested_is_what_is_installed() -> None:
    """Here and in processes that tests start; `-m "not wheel"` for the loop of an editor."""
    there = python("import r3patch; print(r3patch.__file__)").stdout.strip()
    assert there == r3patch.__file__
    assert "site-packages" in Path(r3patch.__file__).parts


def test_the_import_takes_no_heavy_package() -> None:
    """Neither torch, numpy nor megatron, and nothing of ours that needs them: bridges do not."""
    done = python(
        "import sys, r3patch; r3patch.install(); r3patch.status(); r3patch.moe_layers(object());"
        "tops = {name.split('.')[0] for name in sys.modules};"
        "ours = {name.split('.')[1] for name in sys.modules if name.startswith('r3patch.')};"
        "print(sorted(tops & {'torch', 'numpy', 'megatron'}), sorted(ours))"
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.strip()
        == "[] ['_config', '_errors', '_install', '_layers', 'bridges', 'labels']"
    )


def test_the_import_is_quick() -> None:
    """Milliseconds, not the seconds of torch: of the processor, for machines are busy."""
    code = (
        "import time; start = time.process_time(); import r3patch;"
        "print(time.process_time() - start)"
    )
    assert min(float(python(code).stdout) for _ in range(3)) < 0.5


def test_a_wrong_environment_stops_the_import() -> None:
    """The strict reader runs at import, and its error is not an ImportError."""
    done = python("import r3patch", R3PATCH_DISABLE="yes")
    assert done.returncode == 1
    assert "r3patch.ConfigError: R3PATCH_DISABLE is 'yes', but takes '0' or '1'" in done.stderr


@pytest.mark.parametrize("name", r3patch.__all__)
def test_every_public_name_resolves(name: str) -> None:
    """What __all__ lists exists, is listed by dir(), and is found again where it lives."""
    assert getattr(r3patch, name) is getattr(r3patch, name)
    assert name in dir(r3patch)


def test_public_names_are_sorted_and_complete() -> None:
    """__all__ lists each name once, and every lazy one."""
    assert len(set(r3patch.__all__)) == len(r3patch.__all__)
    assert {*r3patch._HOMES, *r3patch._SUBMODULES} <= set(r3patch.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    """Module __getattr__ answers for the names it knows only."""
    with pytest.raises(AttributeError, match=r"^module 'r3patch' has no attribute 'repaly'$"):
        r3patch.repaly  # noqa: B018


def test_errors_belong_to_the_package_and_are_no_import_errors() -> None:
    """Frameworks swallow ImportError around their Megatron imports; ours must get through."""
    errors = [getattr(r3patch, name) for name in r3patch.__all__ if name.endswith("Error")]
    assert len(errors) == 8
    for error in errors:
        assert issubclass(error, r3patch.R3PatchError)
        assert not issubclass(error, ImportError)
        assert error.__module__ == "r3patch"
        assert str(error("one string")) == "one string"
