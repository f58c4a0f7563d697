"""A virtual environment of its own for tests of what happens when Python starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import wrapt

import r3patch

#: Prints whether r3patch is there before Megatron is imported, and after it.
LOOK = (
    "import sys; before = 'r3patch' in sys.modules; import megatron.core; "
    "print(before, 'r3patch' in sys.modules)"
)


class Environment:
    """r3patch, wrapt and an empty Megatron, installed; and nothing else."""

    patience = 60
    """Seconds that a command may take."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True, with_pip=False)
        self.folder = folder
        self.python = folder / "bin" / "python"
        purelib = sysconfig.get_path("purelib", vars={"base": str(folder)})
        self.site = Path(purelib)
        for package in (r3patch, wrapt):
            assert package.__file__
            home = Path(package.__file__).parent
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(home, self.site / home.name, ignore=ignore)
        self.claim_version("1.2.3")
        (self.site / "megatron" / "core").mkdir(parents=True)
        (self.site / "megatron" / "core" / "__init__.py").write_text("NAME = 'megatron.core'\n")

    def claim_version(self, version: str) -> None:
        """What pip would have written."""
        info = self.site / "r3patch-0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Name: r3patch\nVersion: {version}\n")

    @property
    def written(self) -> list[str]:
        """The start-up files that are there."""
        return sorted(path.name for path in self.site.glob("_r3patch_auto*"))

    def run(self, *command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        """The environment's Python with these arguments."""
        return self.call(self.python, *command, **env)

    def call(self, *command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        """Any command, with the environment's programs before others."""
        drop = ("R3PATCH_", "PYTHON", "COVERAGE_")
        clean = {name: text for name, text in os.environ.items() if not name.startswith(drop)}
        clean["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{clean.get('PATH', '')}"
        return subprocess.run(
            [str(part) for part in command],
            cwd=self.folder,
            env={**clean, **env},
            capture_output=True,
            text=True,
            timeout=self.patience,
            check=False,
        )

    def r3patch(self, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "r3patch", *arguments, **env)


def answer(done: subprocess.CompletedProcess[str]) -> str:
    """What a process printed that ended well, and without a word on standard error."""
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.strip()
