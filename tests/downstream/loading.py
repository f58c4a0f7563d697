"""A framework's own files, from a checkout that lies beside this repository.

A replay file of a framework imports little of it, but its packages import everything: Ray, vLLM,
transformers. Here packages are folders whose ``__init__`` does not run, files are imported as they
are, and what a file wants of the rest is a stub.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple


class Checkout(NamedTuple):
    """A clone on disk, and which commit it is at."""

    folder: Path
    commit: str
    date: str


def find_checkout(checkouts: Path, names: Sequence[str]) -> Checkout | None:
    """The first of the names that is a folder with a git history."""
    for folder in (checkouts / name for name in names):
        if folder.is_dir():
            log = ("git", "-C", str(folder), "log", "-1", "--format=%h %cs")
            commit, date = subprocess.run(
                log, capture_output=True, check=True, text=True
            ).stdout.split()
            return Checkout(folder, commit[:9], date)
    return None


class BarePackages:
    """Finds one top-level package in a checkout, its ``__init__`` files left out."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.root = root

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != self.name:
            return None
        place = self.root.joinpath(*fullname.split("."))
        if place.is_dir():
            spec = importlib.machinery.ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(place)]
            return spec
        if place.with_suffix(".py").is_file():
            return importlib.util.spec_from_file_location(fullname, place.with_suffix(".py"))
        return None


def use_package(name: str, root: Path) -> None:
    """Let ``import name.anything`` find the files below `root`."""
    sys.meta_path.insert(0, BarePackages(name, root))


def stub(name: str, **attributes: Any) -> None:
    """A module of that name with these attributes and no others."""
    module = ModuleType(name)
    module.__path__ = []
    vars(module).update(attributes)
    sys.modules[name] = module


def function_of(path: Path, owner: str, name: str, **names: Any) -> Any:
    """A method, out of a file that cannot be imported, as a function of ``self``.

    Args:
        path: the file.
        owner: the class.
        name: the method.
        names: what the method looks up in its module.

    Raises:
        LookupError: the file has no such method any more.
    """
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == name:
                    part.decorator_list = []
                    module = ast.Module([part], type_ignores=[])
                    space = dict(names)
                    exec(compile(module, str(path), "exec"), space)
                    function = space[name]
                    assert isinstance(function, FunctionType)
                    return function
    raise LookupError(f"{path} has no {owner}.{name}: the framework has moved it")
