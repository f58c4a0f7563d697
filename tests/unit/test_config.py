"""The environment: every variable, strictly."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from r3patch import ConfigError, _config


def test_defaults() -> None:
    """An empty environment gives the first value of each row; other variables are not ours."""
    config = _config.read({"PATH": "/bin", "R3": "1"})
    assert config == _config.Config(
        disable=False,
        native="govern",
        bridges=("miles", "slime", "verl"),
        measure=False,
        alarm="warn",
        trace=None,
        auto=True,
    )


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("R3PATCH_DISABLE", "1", "disable", True),
        ("R3PATCH_AUTO", "0", "auto", False),
        ("R3PATCH_NATIVE", "leave", "native", "leave"),
        ("R3PATCH_BRIDGES", "none", "bridges", ()),
        ("R3PATCH_BRIDGES", "verl,miles", "bridges", ("miles", "verl")),
        ("R3PATCH_MEASURE", "1", "measure", True),
        ("R3PATCH_ALARM", "raise", "alarm", "raise"),
        ("R3PATCH_ALARM", "off", "alarm", "off"),
        ("R3PATCH_TRACE", "run/trace.jsonl", "trace", "run/trace.jsonl"),
        ("R3PATCH_TRACE", "", "trace", None),
    ],
)
def test_values(name: str, value: str, field: str, expected: Any) -> None:
    """Each value of the table is taken."""
    assert getattr(_config.read({name: value}), field) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("R3PATCH_DISABLE", "true"),
        ("R3PATCH_DISABLE", ""),
        ("R3PATCH_NATIVE", "Govern"),
        ("R3PATCH_BRIDGES", ""),
        ("R3PATCH_BRIDGES", "miles, slime"),
        ("R3PATCH_BRIDGES", "miles,"),
        ("R3PATCH_BRIDGES", "auto,verl"),
        ("R3PATCH_MEASURE", "2"),
        ("R3PATCH_ALARM", "loud"),
    ],
)
def test_other_values_are_refused(name: str, value: str) -> None:
    """The error names the variable, what it got, what it takes and the default."""
    with pytest.raises(ConfigError) as caught:
        _config.read({name: value})
    variable = next(v for v in _config.TABLE.values() if v.name == name)
    assert str(caught.value).startswith(f"{name} is {value!r}, but takes {variable.takes}; ")
    assert f"the default is {variable.default!r} (" in str(caught.value)


def test_unknown_variables_are_refused() -> None:
    """A misspelt switch is an error that lists the known ones, not a run without the switch."""
    with pytest.raises(ConfigError) as caught:
        _config.read({"R3PATCH_MESURE": "1", "R3PATCH_DISABLE": "1"})
    assert str(caught.value) == (
        "unknown environment variable R3PATCH_MESURE: r3patch knows R3PATCH_ALARM, "
        "R3PATCH_AUTO, R3PATCH_BRIDGES, R3PATCH_DISABLE, R3PATCH_MEASURE, R3PATCH_NATIVE, "
        "R3PATCH_TRACE. Unset it or correct its name."
    )


def test_override() -> None:
    """Fields have other values inside the block, nested too, and their own again after it."""
    before = _config.CONFIG
    with _config.override(native="leave") as config:
        assert config is _config.CONFIG
        with _config.override(bridges=("verl",)):
            assert (_config.CONFIG.native, _config.CONFIG.bridges) == ("leave", ("verl",))
        assert _config.CONFIG is config
    assert _config.CONFIG is before


def test_override_ends_with_an_exception() -> None:
    """A block that raises gives the configuration back."""
    before = _config.CONFIG
    with pytest.raises(KeyError), _config.override(measure=True):
        raise KeyError
    assert _config.CONFIG is before


def test_override_of_an_unknown_field() -> None:
    """A misspelt field is an error, as a misspelt variable is."""
    with pytest.raises(TypeError, match="mesure"), _config.override(mesure=True):
        pass


def test_nobody_keeps_a_configuration_of_his_own() -> None:
    """Every module reads ``_config.CONFIG`` when it needs it, so that an override reaches it."""
    package = Path(_config.__file__).parent
    importers = [
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if re.search(r"from r3patch\._config import .*\bCONFIG\b", file.read_text())
    ]
    assert importers == []


def test_names_have_one_spelling() -> None:
    """A variable in other letters is another one, and would be passed over."""
    with pytest.raises(ConfigError, match="unknown environment variable R3PATCH_Measure"):
        _config.read({"R3PATCH_Measure": "1"})


def test_a_trace_named_as_a_folder_is_refused(tmp_path: Path) -> None:
    """Also where there is no such folder yet."""
    with pytest.raises(ConfigError, match="that is a folder, name a file in it"):
        _config.read({"R3PATCH_TRACE": f"{tmp_path / 'new'}{os.sep}"})
