"""What all tests share: a clean environment, the versions in the header, and honest selection.

A test of a feature that the installed Megatron lacks is *deselected*, by looking for the feature.
A test that needs Megatron itself, or a browser, must run in CI: what is absent fails the session.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import operator
import os
import shutil
from collections.abc import Callable, Generator
from importlib import metadata

import pytest

for _name in [name for name in os.environ if name.startswith("R3PATCH_")]:
    del os.environ[_name]
# Without it (Python 3.11) a child finds the source tree, in its working directory, first.
os.environ.setdefault("PYTHONSAFEPATH", "1")
# Megatron's jit_fuser is torch.compile, which looks for a C++ compiler. test_compile.py unsets it.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

IN_CI = bool(os.environ.get("CI"))
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def pytest_report_header() -> str:
    versions = []
    for package in ("torch", "megatron-core", "wrapt"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return ", ".join(versions)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    absent = []
    if not _installed("megatron.core"):
        absent.append("megatron")
    if not any(map(shutil.which, BROWSERS)):
        absent.append("browser")
    lacking = [item for name in absent for item in items if item.get_closest_marker(name)]
    if lacking and IN_CI:
        raise pytest.UsageError(f"CI must run the tests that need: {', '.join(absent)}")
    lacking += [item for item in items if item not in lacking and not _has_features(item)]
    if lacking:
        items[:] = [item for item in items if item not in lacking]
        config.hook.pytest_deselected(items=lacking)


def _installed(module: str) -> bool:
    """Without importing it: Megatron and torch take seconds that most unit tests need not wait."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the parent
        return False


def _has_features(item: pytest.Item) -> bool:
    return all(_has(str(what)) for mark in item.iter_markers("feature") for what in mark.args)


def _has(feature: str) -> bool:
    """By the words that pyproject.toml gives for the marker: config, module or takes."""
    kind, _, what = feature.partition(":")
    if kind == "config":
        try:
            from megatron.core.transformer import TransformerConfig
        except ImportError:
            return False
        return what in {field.name for field in dataclasses.fields(TransformerConfig)}
    assert kind in {"module", "takes"}, feature
    module, attribute, parameter = f"{what}::".split(":")[:3]
    try:
        found = operator.attrgetter(attribute or "__name__")(importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    return kind == "module" or _takes(found, parameter)


def _takes(function: Callable[..., object], parameter: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == parameter or p.kind is p.VAR_KEYWORD for p in parameters)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    skipped = report.skipped and not hasattr(report, "wasxfail")
    if IN_CI and skipped and item.get_closest_marker("megatron"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped in CI: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    # A file that skips itself as a whole has no tests whose markers could be asked.
    if IN_CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped in CI: {report.longrepr}"
    return report
