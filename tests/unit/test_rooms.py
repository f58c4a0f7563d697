"""The rooms of the package: who may import whom, deferred and type-checking imports counted."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import r3patch

PACKAGE = Path(r3patch.__file__).parent

FLOOR = {"_errors", "_config", "_version", "_layers"}
#: What each room may import besides itself: errors, config <- labels | rows <- metrics, observe,
#: bridges <- sessions <- cli.
MAY_IMPORT: dict[str, set[str]] = {
    "_errors": set(),
    "_version": set(),
    "_startup": set(),  # copied out of the package, and run without it
    "_config": {"_errors", "_startup"},
    "_layers": {"_errors"},
    "labels": FLOOR,
    "rows": FLOOR,
    "metrics": FLOOR | {"labels", "rows"},
    "observe": FLOOR | {"labels", "rows", "metrics"},
    "bridges": FLOOR | {"labels", "rows"},
    "sessions": FLOOR | {"labels", "rows", "metrics", "observe", "bridges"},
    "testing": FLOOR | {"labels"},
    "_install": FLOOR | {"labels", "bridges"},
    "__init__": FLOOR
    | {"_install", "labels", "rows", "metrics", "observe", "bridges", "sessions", "testing"},
    "__main__": {"cli"},
    "cli": FLOOR
    | {
        "__init__",
        "_startup",
        "labels",
        "rows",
        "metrics",
        "observe",
        "bridges",
        "sessions",
        "testing",
    },
}
#: The modules, or the rooms, that may import a package at run time, deferred or not.
IMPORTERS = {
    "wrapt": ("labels.patch",),
    "megatron": ("sessions._preflight", "sessions._tap", "testing", "cli.demo"),
    "torch": ("rows", "metrics", "sessions", "testing", "cli"),
}
#: The only places that name a module of Megatron's, as an import or as text.
NAME_MEGATRON = (
    "_startup",  # what it waits for
    "labels.targets",
    "rows.layout",  # Layout.from_megatron asks parallel_state for this rank
    "bridges",
    "sessions._preflight",  # which top-k function is installed, and what it does
    "sessions._tap",  # Megatron's own group-limited top-k
    "testing",
    "cli.demo",
    "cli.doctor",
)


class Import(NamedTuple):
    """One imported name: a module of ours without ``r3patch.`` in front, or a foreign one."""

    importer: str
    imported: str
    line: int
    for_types_only: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


class Source(NamedTuple):
    """What a file says, once for all tests: names, their lines, whether for type-checkers only."""

    imports: list[tuple[str, int, bool]]
    megatron: list[tuple[str, int]]


@functools.cache
def read(text: str) -> Source:
    nodes = list(ast.walk(ast.parse(text)))
    typing = {
        node
        for block in nodes
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno, node in typing) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not resolved here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name, node.lineno, node in typing) for name in names]
    constants = [(str(node.value), node.lineno) for node in nodes if isinstance(node, ast.Constant)]
    return Source(found, [c for c in constants if re.fullmatch(r"megatron(\.\w+)+", c[0])])


def modules(package: Path) -> dict[str, Source]:
    """Every module by its dotted name, ``r3patch`` itself as ``__init__``."""
    sources = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"
        sources[name] = read(file.read_text(encoding="utf-8"))
    return sources


def imports(package: Path) -> Iterator[Import]:
    sources = modules(package)
    for importer, source in sources.items():
        for name, line, typing in source.imports:
            ours = name == "r3patch" or name.startswith("r3patch.")
            found = _module(name[len("r3patch.") :], sources) if ours else name
            yield Import(importer, found, line, typing)


def _module(name: str, sources: dict[str, Source]) -> str:
    """The module that a dotted name is, or is an attribute of."""
    while name and name not in sources:
        name = name.rpartition(".")[0]
    return name or "__init__"


def room(module: str) -> str:
    return module.partition(".")[0]


def within(module: str, places: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"{place}.") for place in places)


def circles(package: Path) -> list[str]:
    ours = modules(package)
    graph: dict[str, set[str]] = {}
    for found in imports(package):
        if found.imported in ours:
            graph.setdefault(found.importer, set()).add(found.imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def wrong_ways(package: Path) -> list[str]:
    ours = modules(package)
    return [
        str(found)
        for found in imports(package)
        if found.imported in ours
        and room(found.imported) not in {room(found.importer), *MAY_IMPORT[room(found.importer)]}
    ]


def foreign_packages(package: Path) -> list[str]:
    return [
        str(found)
        for found in imports(package)
        if room(found.imported) in IMPORTERS
        and not found.for_types_only
        and not within(found.importer, IMPORTERS[room(found.imported)])
    ]


def names_of_megatron(package: Path) -> list[str]:
    texts = [
        f"{module}:{line} names {name}"
        for module, source in modules(package).items()
        for name, line in source.megatron
        if not within(module, NAME_MEGATRON)
    ]
    return texts + [
        str(found)
        for found in imports(package)
        if room(found.imported) == "megatron" and not within(found.importer, NAME_MEGATRON)
    ]


RULES: list[Callable[[Path], list[str]]] = [
    circles,
    wrong_ways,
    foreign_packages,
    names_of_megatron,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    """No circle, no import upwards, wrapt, torch and Megatron in their places only."""
    assert rule(PACKAGE) == []


@pytest.mark.parametrize(
    ("rule", "file", "code", "found"),
    [
        (circles, "labels/scope.py", "import r3patch.labels.model", "labels.model <- labels.scope"),
        (circles, "rows/routes.py", "def f():\n    from r3patch import Layout", "rows.routes"),
        (wrong_ways, "rows/routes.py", "from r3patch.labels import scope", "imports labels.scope"),
        (wrong_ways, "_errors.py", "import r3patch", "_errors:1 imports __init__"),
        (wrong_ways, "_config.py", "if TYPE_CHECKING:\n    from r3patch import cli", "cli"),
        (foreign_packages, "bridges/verl.py", "def f():\n    import torch", "imports torch"),
        (foreign_packages, "sessions/manager.py", "import wrapt", "imports wrapt"),
        (foreign_packages, "rows/routes.py", "from megatron import core", "megatron.core"),
        (names_of_megatron, "metrics.py", "NAME = 'megatron.core.mpu'", "names megatron.core.mpu"),
        (names_of_megatron, "metrics.py", "from megatron import core", "imports megatron.core"),
    ],
)
def test_the_rule_sees_what_breaks_it(
    tmp_path: Path, rule: Callable[[Path], list[str]], file: str, code: str, found: str
) -> None:
    """Each rule names an import that is added on purpose, wherever in a file it stands."""
    broken = shutil.copytree(PACKAGE, tmp_path / "r3patch")
    text = (broken / file).read_text(encoding="utf-8")
    (broken / file).write_text(f"{code}\n{text}", encoding="utf-8")
    assert found in "\n".join(rule(broken))
