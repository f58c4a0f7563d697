"""The finder of the start-up file, without a start: in a process where r3patch is there already."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from r3patch import cli
from r3patch.cli import run


def test_the_finder_waits_for_one_module_and_gives_its_loader_back(
    fresh: Callable[..., str],
) -> None:
    """Armed twice it is there once; what nobody has is not found; others' loaders go around it."""
    fresh(
        """
        import importlib.util, sys, wrapt
        from r3patch._startup import _r3patch_auto as auto
        auto.start()
        auto.arm("again", "nothing")
        (finder,) = [f for f in sys.meta_path if hasattr(f, "is_r3patch")]
        assert finder.find_spec("json") is None
        seen = []
        wrapt.register_post_import_hook(lambda module: seen.append(module.__name__), auto.WAITS_FOR)
        spec = importlib.util.find_spec(auto.WAITS_FOR)
        assert spec.loader.get_filename(auto.WAITS_FOR) == spec.origin  # the real loader's
        import megatron.core
        assert seen == ["megatron.core"]
        path, sys.path[:] = list(sys.path), []
        sys.path_importer_cache.clear()
        assert finder.find_spec(auto.WAITS_FOR) is None
        """
    )


@pytest.mark.parametrize(
    ("code", "error", "text"),
    [
        ("sys.modules['r3patch'] = None", "RuntimeError", "because, but r3patch cannot be"),
        ("sys.modules['r3patch'] = sys", "RuntimeError", "has no attribute 'install'"),
        (
            (
                "import os; os.environ['R3PATCH_NATIVE'] = 'x'\nfor name in [*sys.modules]:\n"
                "    if name.startswith('r3patch'): del sys.modules[name]"
            ),
            "ConfigError",
            "R3PATCH_NATIVE is 'x'",
        ),
    ],
)
def test_what_is_wrong_with_r3patch_is_an_error_of_the_import_of_megatron(
    fresh: Callable[..., str], code: str, error: str, text: str
) -> None:
    """No ImportError; our own errors as they are."""
    out = fresh(
        f"""
import sys
from r3patch._startup import _r3patch_auto as auto
auto.arm("because", "do this")
{code}
try:
    import megatron.core
except ImportError:
    print("swallowed")
except Exception as error:
    print(type(error).__name__, error)
"""
    )
    assert out.startswith(error)
    assert text in out


def test_the_sitecustomize_arms_and_hands_over(fresh: Callable[..., str], tmp_path: Path) -> None:
    """The next one on the path runs under the name, and where there is none nothing happens."""
    (tmp_path / "sitecustomize.py").write_text("print('the next')")
    out = fresh(
        f"""
        import runpy, sys
        from r3patch._startup import _r3patch_auto
        sys.modules["_r3patch_auto"] = _r3patch_auto
        ours = {str(Path(run.FOLDER) / "sitecustomize.py")!r}
        sys.path.insert(0, {str(tmp_path)!r})
        runpy.run_path(ours)
        print(any(hasattr(finder, "is_r3patch") for finder in sys.meta_path))
        sys.path[:] = []
        runpy.run_path(ours)
        """
    )
    assert out.split("\n")[:2] == ["the next", "True"]


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (FileNotFoundError(2, "No such file"), 127, "program: not found"),
        (PermissionError(13, "Permission denied"), 126, "program: cannot be started: Permission"),
    ],
)
def test_run_becomes_the_command_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: OSError,
    status: int,
    text: str,
) -> None:
    """It executes it with the folder first on PYTHONPATH; a separator is no part of it."""
    called = []

    def become(file: str, command: list[str], environ: dict[str, str]) -> None:
        called.append((file, command, environ["PYTHONPATH"].split(os.pathsep)[0]))
        raise error

    monkeypatch.setattr(os, "execvpe", become)
    assert cli.main(["run", "--", "program", "--flag"]) == status
    assert called == [("program", ["program", "--flag"], run.FOLDER)]
    assert text in capsys.readouterr().err
    assert cli.main(["run"]) == 2
