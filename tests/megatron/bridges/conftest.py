"""The managers: Megatron's own, and stand-ins of miles, slime and verl under their real names.

The stand-ins in `foreign/` are written from documented behaviour; no code in them is theirs.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import r3patch
from r3patch import bridges, testing

from .common import NATIVE, Foreign, megatrons_routing


@pytest.fixture(scope="module", autouse=True)
def cpu() -> Iterator[None]:
    with testing.megatron_on_cpu():
        yield


@pytest.fixture(autouse=True)
def _clean() -> None:
    """No failure and no warning of another test."""
    bridges.uninstall()
    bridges.install()


@pytest.fixture(autouse=True)
def registry() -> Iterator[list[Any]]:
    """Megatron's global list, empty before and after."""
    from megatron.core.transformer.moe.router_replay import RouterReplay

    instances: list[Any] = RouterReplay.global_router_replay_instances
    instances.clear()
    yield instances
    instances.clear()


def load(name: str, file: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in of a foreign module, under its real name."""
    path = Path(__file__).parent / "foreign" / file
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def miles(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = load("miles.utils.replay_base", "miles_replay_base.py", monkeypatch)
    module.routing_replay_manager.enabled = True
    return module.routing_replay_manager


@pytest.fixture
def slime(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ENABLE_ROUTING_REPLAY", "1")
    monkeypatch.setenv("ROUTING_REPLAY_STAGE", "fallthrough")
    return load("slime.utils.routing_replay", "slime_routing_replay.py", monkeypatch)


@pytest.fixture
def verl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """verl's module; its patch is the test's to apply."""
    from megatron.core.transformer.moe.router import TopKRouter

    r3patch.uninstall()
    before = {name: vars(TopKRouter)[name] for name in ("__init__", "routing")}
    r3patch.install()
    yield load(
        "verl.utils.megatron.router_replay_patch", "verl_router_replay_patch.py", monkeypatch
    )
    r3patch.uninstall()
    for attribute, value in before.items():
        setattr(TopKRouter, attribute, value)
    if "_router_replay_patched" in vars(TopKRouter):
        del TopKRouter._router_replay_patched
    r3patch.install()


@pytest.fixture(params=["native", "miles", "slime", "verl"])
def foreign(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Foreign:
    """Each manager in turn, ready to register routers."""
    name: str = request.param
    if name == "native":
        return _native(request.getfixturevalue("registry"))
    manager = request.getfixturevalue(name)
    if name == "miles":
        return Foreign(
            name,
            streams=lambda: manager.replays,
            stream_of=lambda router: router.routing_replay,
            fill=lambda stream, ids: stream.top_indices_list.append(ids.int()),
            start=lambda: setattr(manager, "stage", "replay_forward"),
            stop=lambda: setattr(manager, "stage", "fallthrough"),
        )
    if name == "slime":
        return Foreign(
            name,
            streams=lambda: manager.RoutingReplay.all_routing_replays,
            stream_of=lambda router: router.routing_replay,
            fill=lambda stream, ids: stream.top_indices_list.append(ids),
            start=lambda: monkeypatch.setenv("ROUTING_REPLAY_STAGE", "replay_forward"),
            stop=lambda: monkeypatch.setenv("ROUTING_REPLAY_STAGE", "fallthrough"),
        )
    manager.apply_router_replay_patch()
    replay, action = manager.RouterReplay, manager.RouterReplayAction
    return Foreign(
        name,
        streams=lambda: replay.router_instances,
        stream_of=lambda router: router.router_replay,
        fill=lambda stream, ids: setattr(stream, "target_topk_idx", ids),
        start=lambda: replay.set_global_router_replay_action(action.REPLAY_FORWARD),
        stop=lambda: replay.set_global_router_replay_action(None),
        without_it=megatrons_routing,
    )


def _native(registry: list[Any]) -> Foreign:
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    set_action = RouterReplay.set_global_router_replay_action
    return Foreign(
        "native",
        streams=lambda: registry,
        stream_of=lambda router: router.router_replay,
        fill=lambda stream, ids: stream.set_target_indices(ids),
        start=lambda: set_action(RouterReplayAction.REPLAY_FORWARD),
        stop=RouterReplay.clear_global_router_replay_action,
        config=NATIVE,
    )
