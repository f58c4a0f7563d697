"""Public names and tests say what they are for."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import r3patch

TESTS = Path(__file__).parents[1]
USER_CODE = TESTS / "typing" / "user_code.py"


def public() -> Iterator[tuple[str, object]]:
    """What ``__all__`` names, in the submodules too, and the methods and properties of classes."""
    modules = [r3patch, r3patch.bridges, r3patch.metrics, r3patch.testing]
    for module in modules:
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, ModuleType) or callable(value):
                yield f"{module.__name__}.{name}", value
            if inspect.isclass(value) and not issubclass(value, Exception):
                for member, method in vars(value).items():
                    documented = inspect.isroutine(method) or isinstance(method, property)
                    if documented and not member.startswith("_"):
                        yield f"{module.__name__}.{name}.{member}", method


PUBLIC = dict(public())


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_docstring(name: str) -> None:
    """Functions, classes, methods, properties and submodules, by a sentence of their own."""
    documentation = inspect.getdoc(PUBLIC[name]) or ""
    assert documentation, f"{name} has no docstring"
    assert not documentation.startswith(f"{name.rpartition('.')[2]}("), "a dataclass's own text"


def test_user_code_uses_every_public_name() -> None:
    """tests/typing/user_code.py is what mypy and pyright know of the public names."""
    text = USER_CODE.read_text(encoding="utf-8")
    unused = [name for name in r3patch.__all__ if not re.search(rf"\b{name}\b", text)]
    assert unused == []


@pytest.mark.parametrize("file", sorted(TESTS.rglob("test_*.py")), ids=lambda file: file.name)
def test_a_test_says_its_claim(file: Path) -> None:
    """Each in the docstring of the function; a file says its subject."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    silent = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert silent == []
    assert ast.get_docstring(tree)
