"""The one reader of the environment: every ``R3PATCH_`` variable, its values and its default.

Read once, at import, and strictly: a misspelt switch that is ignored would leave a run trained
differently from what its owner asked for, without a word. The rest of the package reads
``_config.CONFIG`` at the time of use, so that `override` reaches everyone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from r3patch._errors import ConfigError

PREFIX = "R3PATCH_"
BRIDGES = ("miles", "slime", "verl")


@dataclass(frozen=True)
class Variable:
    """One row of the environment table."""

    name: str
    default: str
    takes: str
    effect: str
    parse: Callable[[str], Any]
    """Turns the text into the field of `Config`; raises ValueError for any other text."""


@dataclass(frozen=True)
class Config:
    """What the environment asks for."""

    disable: bool
    native: str
    bridges: tuple[str, ...]
    measure: bool
    alarm: Literal["warn", "raise", "off"]
    trace: str | None
    auto: bool


def _one_of(choices: Mapping[str, Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if text not in choices:
            raise ValueError(text)
        return choices[text]

    return parse


def _bridges(text: str) -> tuple[str, ...]:
    if text in ("auto", "none"):
        return BRIDGES if text == "auto" else ()
    names = text.split(",")
    if not set(names) <= set(BRIDGES):
        raise ValueError(text)
    return tuple(name for name in BRIDGES if name in names)


def _trace(text: str) -> str | None:
    """Refuses what is known to fail without touching the disk: a session may never come.

    A folder that is not there is none of that, as long as the run could make it.
    """
    if not text:
        return None
    from pathlib import Path  # a third of what the import of r3patch costs

    path = Path(text)
    try:
        folder = next(parent for parent in path.parents if parent.exists())
        if path.is_dir() or text.endswith(os.sep):
            reason = "that is a folder, name a file in it"
        elif not folder.is_dir():
            reason = f"{folder} is not a folder"
        elif not os.access(folder, os.W_OK | os.X_OK):
            reason = f"this process cannot write to {folder.absolute()}"
        else:
            return text
    except OSError as error:  # a name too long, a folder that may not be looked into
        reason = str(error)
    raise ConfigError(f"R3PATCH_TRACE is {text!r}: {reason}. Correct the path or unset it.")


_SWITCH = _one_of({"0": False, "1": True})

#: Keyed by the field of `Config` that the variable sets.
TABLE: dict[str, Variable] = {
    "disable": Variable(
        "R3PATCH_DISABLE", "0", "'0' or '1'", "1: the import patches nothing", _SWITCH
    ),
    "native": Variable(
        "R3PATCH_NATIVE",
        "govern",
        "'govern' or 'leave'",
        "leave: Megatron's own RouterReplay registry is not touched",
        _one_of({"govern": "govern", "leave": "leave"}),
    ),
    "bridges": Variable(
        "R3PATCH_BRIDGES",
        "auto",
        "'auto', 'none', or names out of 'miles,slime,verl' with commas and no spaces",
        "which foreign replay managers to govern; auto: those the process imports",
        _bridges,
    ),
    "measure": Variable("R3PATCH_MEASURE", "0", "'0' or '1'", "default of measure=", _SWITCH),
    "alarm": Variable(
        "R3PATCH_ALARM",
        "warn",
        "'warn', 'raise' or 'off'",
        "default of alarm=: what routes that hardly are the model's do",
        _one_of({"warn": "warn", "raise": "raise", "off": "off"}),
    ),
    "trace": Variable(
        "R3PATCH_TRACE",
        "",
        "nothing, or a path",
        "JSON lines, one per session and rank",
        _trace,
    ),
    "auto": Variable(
        "R3PATCH_AUTO",
        "1",
        "'1' or '0'",
        "0: a start-up file that `r3patch auto on` has written does nothing",
        _SWITCH,
    ),
}


def read(environ: Mapping[str, str]) -> Config:
    """Parse the ``R3PATCH_`` variables of an environment.

    Raises:
        ConfigError: a variable is not in `TABLE`, or its value is not one it takes.
    """
    known = {variable.name for variable in TABLE.values()}
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise ConfigError(
            f"unknown environment variable {', '.join(unknown)}: r3patch knows "
            f"{', '.join(sorted(known))}. Unset it or correct its name."
        )
    return Config(**{field: _value(variable, environ) for field, variable in TABLE.items()})


def _value(variable: Variable, environ: Mapping[str, str]) -> Any:
    text = environ.get(variable.name, variable.default)
    try:
        return variable.parse(text)
    except ValueError:
        raise ConfigError(
            f"{variable.name} is {text!r}, but takes {variable.takes}; the default is "
            f"{variable.default!r} ({variable.effect})."
        ) from None


try:
    CONFIG = read(os.environ)
except ConfigError:
    # Who imports r3patch may swallow this, as verl does with what its plugins raise. Then whoever
    # imports Megatron hears it: the import of r3patch is tried again there.
    from r3patch._startup._r3patch_auto import arm

    arm("r3patch was imported", "do not import r3patch")
    raise


@contextmanager
def override(**fields: Any) -> Iterator[Config]:
    """Other values for fields of `Config` inside the block, in the whole process.

    For tests, and for the demo, which traces a part of itself.

    Raises:
        TypeError: `Config` has no such field.
    """
    global CONFIG
    before = CONFIG
    CONFIG = replace(before, **fields)
    try:
        yield CONFIG
    finally:
        CONFIG = before
