"""Other replay managers on stock Megatron with MTP: registries, selections and bits.

miles, slime and verl are stand-ins in `foreign/`, written from their documented behaviour; the
native one is Megatron's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import r3patch
from r3patch import Routes, bridges, testing
from r3patch.bridges import _common, native
from r3patch.labels import scope as _scope

pytestmark = pytest.mark.megatron

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
RECOMPUTE = pytest.mark.parametrize("recompute", [{}, FULL], ids=["no_recompute", "full"])
NATIVE = {"moe_enable_routing_replay": True}
EXPERTS, TOPK, BATCH, LENGTH = 16, 4, 2, 12
TOKENS = BATCH * LENGTH


@pytest.fixture(scope="module", autouse=True)
def cpu() -> Iterator[None]:
    with testing.megatron_on_cpu():
        yield


@pytest.fixture(autouse=True)
def registry() -> Iterator[list[Any]]:
    """Megatron's global list, empty before and after."""
    from megatron.core.transformer.moe.router_replay import RouterReplay

    RouterReplay.global_router_replay_instances.clear()
    yield RouterReplay.global_router_replay_instances
    RouterReplay.global_router_replay_instances.clear()


def load(name: str, file: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The stand-in of a foreign module, under its real name."""
    path = Path(__file__).parent / "foreign" / file
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(bridges, "_checked", {})
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
    from megatron.core.transformer.moe.router import TopKRouter

    r3patch.uninstall()
    before = {name: vars(TopKRouter)[name] for name in ("__init__", "routing")}
    r3patch.install()
    name = "verl.utils.megatron.router_replay_patch"
    yield load(name, "verl_router_replay_patch.py", monkeypatch)
    r3patch.uninstall()
    for attribute, value in before.items():
        setattr(TopKRouter, attribute, value)
    if "_router_replay_patched" in vars(TopKRouter):
        del TopKRouter._router_replay_patched
    r3patch.install()


def build(**overrides: Any) -> torch.nn.Module:
    config = {"num_layers": 3, "num_moe_experts": EXPERTS, "moe_router_topk": TOPK, **overrides}
    (model,) = testing.tiny_model(**config)
    testing.seed_parameters(model)
    return model.train()


def loss_of(model: torch.nn.Module, seed: int = 1) -> torch.Tensor:
    (batch,) = testing.random_batches(
        num_microbatches=1, micro_batch_size=BATCH, seq_length=LENGTH, seed=seed
    )
    return model(**batch).mean()


def random_ids(seed: int) -> torch.Tensor:
    noise = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))
    return noise.topk(TOPK).indices


def as_map(ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(ids), EXPERTS, dtype=torch.bool).scatter(1, ids.long(), True)


class Calls(testing.RoutingCalls):
    """Every routing call; the maps of a main router by its layer number."""

    def maps(self, layer: int) -> list[torch.Tensor]:
        key = ("main", layer)
        return [c.routing_map for c in self if (c.info.scope, c.info.layer_number) == key]


def assert_mtp_is_megatrons_own(calls: Calls) -> None:
    """On the same input and weights, in a model that no manager has seen, to the bit."""
    (plain,) = r3patch.routers(build(), "mtp")
    seen = [call for call in calls if call.info.scope == "mtp"]
    assert seen
    for call in seen:
        with torch.set_grad_enabled(call.grad_enabled):
            own_probs, own_map = plain.module(call.input)
        assert torch.equal(own_probs, call.probs)
        assert torch.equal(own_map, call.routing_map)


def main(model: torch.nn.Module) -> list[Any]:
    return [info.module for info in r3patch.routers(model, "main")]


def mtp(model: torch.nn.Module) -> Any:
    (info,) = r3patch.routers(model, "mtp")
    return info.module


# Megatron's own


def test_native_registry_has_main_routers_only(registry) -> None:
    """The MTP router's instance is not in the list, and the router has none."""
    model = build(**NATIVE)
    assert registry == [router.router_replay for router in main(model)]
    assert mtp(model).router_replay is None


@RECOMPUTE
def test_native_decoder_only_data(registry, recompute) -> None:
    """set_replay_data takes the decoder's layers, main routers use them, MTP keeps its own."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    model = build(**NATIVE, **recompute)
    calls = Calls(model)
    ids = [random_ids(seed) for seed in (2, 3)]
    RouterReplay.set_replay_data(ids)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    loss = loss_of(model)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
    loss.backward()
    for layer in (2, 3):
        assert len(calls.maps(layer)) == (2 if recompute else 1)
        for routing_map in calls.maps(layer):
            assert torch.equal(routing_map, as_map(ids[layer - 2]))
    assert_mtp_is_megatrons_own(calls)


def test_native_round_trip(registry) -> None:
    """What get_recorded_data gives, set_replay_data takes: the same layers both ways."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    model = build(**NATIVE)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    plain = loss_of(model)
    recorded = RouterReplay.get_recorded_data()
    assert [ids.shape for ids in recorded] == [(TOKENS, TOPK)] * 2
    RouterReplay.set_replay_data(recorded)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    assert torch.equal(loss_of(model), plain)


def test_a_session_sets_native_instances_aside(registry) -> None:
    """replay() works on such a model; afterwards each router has its own instance, untouched."""
    model = build(**NATIVE)
    before = [router.router_replay for router in main(model)]
    calls = Calls(model)
    ids = torch.stack([random_ids(2), random_ids(3)], dim=1)
    with r3patch.replay(model, [Routes(ids, (2, 3), num_experts=EXPERTS)]):
        loss_of(model).backward()
    assert torch.equal(calls.maps(2)[0], as_map(ids[:, 0]))
    assert [router.router_replay for router in main(model)] == before
    assert all(replay.target_topk_idx is None for replay in before)


def test_an_active_native_action_is_refused(registry) -> None:
    """Two replays on one call would contradict each other: the message names the manager."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    model = build(**NATIVE)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    with pytest.raises(r3patch.UnsupportedRoutingError, match="manager native is replaying"):
        r3patch.record(model).__enter__()


def test_drive_fills_the_live_model(registry) -> None:
    """drive() sets rows by layer number, on this model only; invalid rows are refused."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    other, model = build(**NATIVE), build(**NATIVE)
    ids = torch.stack([random_ids(3), random_ids(2)], dim=1)
    native.drive(model, Routes(ids, (3, 2), num_experts=EXPERTS))
    assert all(router.router_replay.target_topk_idx is None for router in main(other))
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    calls = Calls(model)
    loss_of(model)
    assert torch.equal(calls.maps(2)[0], as_map(ids[:, 1]))
    assert torch.equal(calls.maps(3)[0], as_map(ids[:, 0]))
    gap = Routes(ids, (3, 2), torch.arange(TOKENS) > 0, num_experts=EXPERTS)
    with pytest.raises(r3patch.RoutesError, match="rows without routes"):
        native.drive(model, gap)
    native.drive(model, gap, missing="spread")
    with pytest.raises(r3patch.ReplayError, match="moe_enable_routing_replay"):
        native.drive(build(), Routes(ids, (3, 2), num_experts=EXPERTS))


def test_native_left_alone(registry, monkeypatch) -> None:
    """With the bridge off the MTP instance stays where Megatron put it."""
    monkeypatch.setattr(bridges, "_enabled", list)
    model = build(**NATIVE)
    assert len(registry) == 3
    assert registry[-1] is mtp(model).router_replay


def test_an_exception_in_an_mtp_constructor(registry, monkeypatch) -> None:
    """The list holds what a plain run would hold, without MTP; the next model is governed too."""
    from megatron.core.transformer import multi_token_prediction

    layer = multi_token_prediction.MultiTokenPredictionLayer
    monkeypatch.setattr(layer, "__init__", fails_after(layer.__init__))
    with pytest.raises(RuntimeError, match="boom"):
        build(**NATIVE)
    assert len(registry) == 2
    monkeypatch.undo()
    assert _scope.current() == "main"
    model = build(**NATIVE)
    assert registry[2:] == [router.router_replay for router in main(model)]


def fails_after(constructor: Any) -> Any:
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        constructor(self, *args, **kwargs)
        raise RuntimeError("boom")

    return construct


def test_a_head_labelled_later_leaves_the_registry(registry) -> None:
    """label(head, scope="mtp") takes a router out that was built as a main one."""
    model = build(**NATIVE)
    head = model.decoder.layers[2]
    replay = head.mlp.router.router_replay
    r3patch.label(head, scope="mtp")
    assert all(known is not replay for known in registry)
    assert head.mlp.router.router_replay is None


# miles


@RECOMPUTE
def test_miles_on_stock_megatron(miles, recompute) -> None:
    """Its fill by position and its two stages work unchanged, without the Megatron fork."""
    model = build(**recompute)
    assert miles.replays == [router.routing_replay for router in main(model)]
    assert not hasattr(mtp(model), "routing_replay")
    ids = [random_ids(seed) for seed in (2, 3)]
    for replay, rows in zip(miles.replays, ids, strict=True):
        replay.top_indices_list.append(rows.int())
    calls = Calls(model)
    miles.stage = "replay_forward"
    loss = loss_of(model)
    miles.stage = "replay_backward"
    loss.backward()
    for layer in (2, 3):
        assert len(calls.maps(layer)) == (2 if recompute else 1)
        for routing_map in calls.maps(layer):
            assert torch.equal(routing_map, as_map(ids[layer - 2]))
    cursors = [(replay.forward_index, replay.backward_index) for replay in miles.replays]
    assert cursors == [(1, 1 if recompute else 0)] * 2
    assert_mtp_is_megatrons_own(calls)


@contextlib.contextmanager
def fork(manager: Any) -> Iterator[None]:
    """What the fork's source does: registers every router, wraps every top-k, whoever calls."""
    from megatron.core.transformer.moe import router as module

    topk_function = module.topk_routing_with_score_function

    class Wrapped:
        def get_replay_topk(self, scores, topk, num_groups, group_topk, default):
            return manager.get_topk_fn(default, return_probs=True)(
                scores, topk, num_groups, group_topk
            )

    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        constructor(self, *args, **kwargs)
        manager.register_to_module(self, "routing_replay")

    @functools.wraps(topk_function)
    def routed(*args: Any, **kwargs: Any) -> Any:
        kwargs["router_replay"] = kwargs.get("router_replay") or Wrapped()
        return topk_function(*args, **kwargs)

    r3patch.uninstall()
    constructor = module.TopKRouter.__init__  # without ours, which goes on top of the fork's
    module.TopKRouter.__init__ = construct
    module.topk_routing_with_score_function = routed
    r3patch.install()
    try:
        yield
    finally:
        r3patch.uninstall()
        module.TopKRouter.__init__ = constructor
        module.topk_routing_with_score_function = topk_function
        r3patch.install()


def test_miles_on_its_fork(miles) -> None:
    """An MTP call moves no cursor, though `current` is the last main router's stream."""
    with fork(miles):
        model = build()
        assert len(miles.replays) == 2
        ids = [random_ids(seed) for seed in (2, 3)]
        for replay, rows in zip(miles.replays, ids, strict=True):
            replay.top_indices_list += [rows, random_ids(9)]
        calls = Calls(model)
        miles.stage = "replay_forward"
        loss_of(model)
        assert miles.stage == "replay_forward"
        with pytest.raises(r3patch.UnsupportedRoutingError, match="manager miles is replaying"):
            r3patch.record(model).__enter__()
    assert [replay.forward_index for replay in miles.replays] == [1, 1]
    assert torch.equal(calls.maps(3)[0], as_map(ids[1]))
    assert_mtp_is_megatrons_own(calls)


def test_an_exception_in_an_mtp_forward_gives_the_stage_back(miles, monkeypatch) -> None:
    """What the first published fix lacked: after an exception the manager is as it was."""
    model = build()
    for replay in miles.replays:
        replay.top_indices_list.append(random_ids(2))
    monkeypatch.setattr(mtp(model), "gating", fails_after(lambda self: None).__get__(mtp(model)))
    miles.stage = "replay_forward"
    with pytest.raises(TypeError):
        loss_of(model)
    assert miles.stage == "replay_forward"


def test_a_session_and_miles(miles) -> None:
    """An active stage is refused; at rest the session replays, and miles' tap comes back."""
    model = build()
    taps = [router.router_replay for router in main(model)]
    routes = Routes(torch.stack([random_ids(2), random_ids(3)], dim=1), (2, 3), num_experts=EXPERTS)
    miles.stage = "replay_forward"
    with pytest.raises(r3patch.UnsupportedRoutingError, match="manager miles is replaying"):
        r3patch.replay(model, [routes]).__enter__()
    miles.stage = "fallthrough"
    calls = Calls(model)
    with r3patch.replay(model, [routes]):
        loss_of(model).backward()
    assert torch.equal(calls.maps(2)[0], as_map(routes.experts[:, 0]))
    assert [router.router_replay for router in main(model)] == taps
    assert [replay.forward_index for replay in miles.replays] == [0, 0]


def test_miles_disabled_registers_nothing(miles) -> None:
    """A critic, built while the manager is off, has no streams."""
    miles.enabled = False
    model = build()
    assert miles.replays == []
    assert all(router.router_replay is None for router in main(model))


# slime


@RECOMPUTE
def test_slime_on_stock_megatron(slime, monkeypatch, recompute) -> None:
    """As many streams as MoE decoder layers, so the count in its fill holds; MTP is its own."""
    model = build(**recompute)
    streams = slime.RoutingReplay.all_routing_replays
    assert streams == [router.routing_replay for router in main(model)]
    ids = [random_ids(seed) for seed in (2, 3)]
    for replay, rows in zip(streams, ids, strict=True):
        replay.top_indices_list.append(rows)
    calls = Calls(model)
    monkeypatch.setenv("ROUTING_REPLAY_STAGE", "replay_forward")
    loss = loss_of(model)
    monkeypatch.setenv("ROUTING_REPLAY_STAGE", "replay_backward")
    loss.backward()
    for layer in (2, 3):
        for routing_map in calls.maps(layer):
            assert torch.equal(routing_map, as_map(ids[layer - 2]))
    cursors = [(stream.forward_index, stream.backward_index) for stream in streams]
    assert cursors == [(1, 1 if recompute else 0)] * 2
    assert_mtp_is_megatrons_own(calls)


def test_slime_registered_by_its_own_patch(slime, monkeypatch) -> None:
    """With slime's Megatron patch nothing is registered twice, and MTP leaves the registry."""
    from megatron.core.transformer.moe.router import TopKRouter

    constructor = TopKRouter.__init__

    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        constructor(self, *args, **kwargs)
        if not hasattr(self, "routing_replay"):
            slime.register_routing_replay(self)

    with monkeypatch.context() as patch:
        patch.setattr(TopKRouter, "__init__", patched)
        model = build()
    streams = slime.RoutingReplay.all_routing_replays
    assert streams == [router.routing_replay for router in main(model)]
    assert not hasattr(mtp(model), "routing_replay")


# verl


@pytest.mark.parametrize("verl_first", [True, False])
def test_verl(verl, verl_first) -> None:
    """MTP leaves verl's registry and routes by Megatron's own code, in either order of patches."""
    if verl_first:
        r3patch.uninstall()
    verl.apply_router_replay_patch()
    if verl_first:
        r3patch.install()
    model = build()
    assert verl.RouterReplay.router_instances == [router.router_replay for router in main(model)]
    assert mtp(model).router_replay is None
    ids = [random_ids(seed) for seed in (2, 3)]
    for router, rows in zip(main(model), ids, strict=True):
        router.router_replay.target_topk_idx = rows
    calls = Calls(model)
    loss_of(model).backward()
    assert torch.equal(calls.maps(2)[0], as_map(ids[0]))
    with PatchedAway(verl):
        assert_mtp_is_megatrons_own(calls)
    verl.RouterReplay.router_instances.clear()


class PatchedAway:
    """Megatron's own routing, for the comparison."""

    def __init__(self, verl: Any) -> None:
        from megatron.core.transformer.moe.router import TopKRouter

        from r3patch.bridges.verl import _own_routing

        self.router, self.own = TopKRouter, _own_routing()

    def __enter__(self) -> None:
        self.patched, self.router.routing = self.router.routing, self.own

    def __exit__(self, *error: Any) -> None:
        self.router.routing = self.patched


# All of them


def test_an_unknown_shape_is_left_alone(miles, caplog, monkeypatch) -> None:
    """A manager without what the bridge needs: failed, with the reason, a warning, no change."""
    del type(miles).get_topk_fn
    monkeypatch.setattr(bridges, "_checked", {})
    model = build()
    assert miles.replays == []
    assert all(router.router_replay is None for router in main(model))
    (status,) = (s for s in bridges.status() if s.name == "miles")
    assert status.state == "failed"
    assert "has no routing_replay_manager.get_topk_fn" in status.detail
    assert "does not govern miles" in caplog.text


def test_bridges_off(miles, slime, monkeypatch) -> None:
    """R3PATCH_BRIDGES=none: nothing is registered, nothing is taken away."""
    monkeypatch.setattr(bridges, "_enabled", lambda: ["native"])
    model = build()
    assert miles.replays == []
    assert slime.RoutingReplay.all_routing_replays == []
    assert not mtp(model)._forward_pre_hooks


def test_two_models_and_a_rebuilt_decoder(miles) -> None:
    """Every main router that was built has a stream, and live ones have theirs."""
    model, donor = build(), build()
    model.decoder = donor.decoder
    assert [router.routing_replay for router in main(model)] == miles.replays[2:]


def test_uninstall_stops_governing(registry) -> None:
    """After uninstall() Megatron's registry is Megatron's again."""
    r3patch.uninstall()
    try:
        build(**NATIVE)
        assert len(registry) == 3
    finally:
        r3patch.install()


def test_an_enabled_manager_goes_before_the_native_one(miles, registry) -> None:
    """Never two replays on one call: miles drives, and native instances leave their registry."""
    model = build(**NATIVE)
    assert registry == []
    for replay in miles.replays:
        replay.top_indices_list.append(random_ids(2))
    miles.stage = "replay_forward"
    calls = Calls(model)
    loss_of(model)
    assert torch.equal(calls.maps(2)[0], as_map(random_ids(2)))


def test_the_first_of_two_managers_drives(miles, slime, caplog) -> None:
    """With miles and slime enabled one of them registers, and a warning says so."""
    build()
    assert len(miles.replays) == 2
    assert slime.RoutingReplay.all_routing_replays == []


@pytest.mark.parametrize("name", ["miles", "slime", "verl"])
def test_a_router_labelled_main_again(name, request, monkeypatch, caplog) -> None:
    """It is not kept out of replay in silence: nothing of the bridge stays, and a warning says."""
    _common._warn_once.cache_clear()
    manager = request.getfixturevalue(name)
    if name == "verl":
        manager.apply_router_replay_patch()
    router = mtp(build())
    r3patch.label(router, scope="main")
    assert not router._forward_pre_hooks
    assert not router._forward_hooks
    assert "routing" not in vars(router)
    assert f"{name} does not replay on it" in caplog.text


def test_two_managers_are_both_kept_out(miles, slime, monkeypatch) -> None:
    """An MTP call sees neither manager's stage, where a process has imported both."""
    router = mtp(build())
    miles.stage = "replay_forward"
    monkeypatch.setenv("ROUTING_REPLAY_STAGE", "replay_forward")
    seen, gating = [], router.gating

    def spied(hidden: torch.Tensor) -> torch.Tensor:
        seen.append((miles.stage, os.environ["ROUTING_REPLAY_STAGE"]))
        return gating(hidden)

    monkeypatch.setattr(router, "gating", spied)
    router(torch.randn(2, 2, router.config.hidden_size))
    assert seen == [("fallthrough", "fallthrough")]
    assert (miles.stage, os.environ["ROUTING_REPLAY_STAGE"]) == ("replay_forward",) * 2


def test_hooks_on_mtp_routers_pickle(miles, slime) -> None:
    """A model with MTP is pickled as without r3patch: the hooks are no closures."""
    router = mtp(build())
    hooks = [*router._forward_pre_hooks.values(), *router._forward_hooks.values()]
    assert len(pickle.loads(pickle.dumps(hooks))) == 4


@pytest.mark.parametrize("name", ["miles", "slime"])
def test_a_megatron_without_the_extension_point(name, request, monkeypatch, caplog) -> None:
    """Before 0.16 nothing would read a stream: none is made, the model is built, and it is said."""
    _common._warn_once.cache_clear()
    manager = request.getfixturevalue(name)
    streams = manager.replays if name == "miles" else manager.RoutingReplay.all_routing_replays

    def old(router: Any) -> None:
        vars(router).pop("router_replay", None)
        bridges._govern(router)

    monkeypatch.setattr(_scope, "listeners", [old])
    with contextlib.suppress(AttributeError):  # the forward of 0.16 and newer is not asked for
        build()
    assert streams == []
    assert "no extension point for replay" in caplog.text
    assert all(status.state != "failed" for status in bridges.status())


def test_native_left_alone_under_miles(miles, registry, monkeypatch) -> None:
    """R3PATCH_NATIVE=leave holds for an enabled manager, too: the list is as Megatron left it."""
    left = dataclasses.replace(_common.CONFIG, native="leave")
    monkeypatch.setattr(_common, "CONFIG", left)
    monkeypatch.setattr(bridges, "CONFIG", left)
    build(**NATIVE)
    assert len(registry) == 3


def test_fused_routing_under_a_manager_is_said(miles, caplog) -> None:
    """The fused kernel returns before the manager is asked, so its routes would not be used."""
    _common._warn_once.cache_clear()
    model = build()
    router = main(model)[0]
    del router.routing_replay
    router.router_replay = None
    miles.replays.clear()
    router.config.moe_router_fusion = True
    bridges._govern(router)
    assert "moe_router_fusion returns before any replay" in caplog.text


def test_a_manager_that_raises(miles, monkeypatch, caplog) -> None:
    """The model is built; the bridge is failed, with the reason, and a warning is there."""

    def changed(*args: Any) -> None:
        raise TypeError("register_to_module() wants a name")

    monkeypatch.setattr(miles, "register_to_module", changed)
    build()
    (status,) = (s for s in bridges.status() if s.name == "miles")
    assert status.state == "failed"
    assert "TypeError: register_to_module() wants a name" in status.detail
    assert "does not govern miles" in caplog.text


@RECOMPUTE
def test_slime_on_its_patch(slime, monkeypatch, recompute) -> None:
    """With slime's top-k around every call, an MTP call moves no cursor and keeps the stage."""
    with slime_patch(slime):
        model = build(**recompute)
        streams = slime.RoutingReplay.all_routing_replays
        assert streams == [router.routing_replay for router in main(model)]
        for stream in streams:
            stream.top_indices_list += [random_ids(3), random_ids(9)]
        calls = Calls(model)
        monkeypatch.setenv("ROUTING_REPLAY_STAGE", "replay_forward")
        loss = loss_of(model)
        monkeypatch.setenv("ROUTING_REPLAY_STAGE", "replay_backward")
        loss.backward()
        cursors = [(stream.forward_index, stream.backward_index) for stream in streams]
        assert cursors == [(1, 1 if recompute else 0)] * 2
        assert os.environ["ROUTING_REPLAY_STAGE"] == "replay_backward"
    assert torch.equal(calls.maps(2)[0], as_map(random_ids(3)))
    monkeypatch.setenv("ENABLE_ROUTING_REPLAY", "0")
    assert_mtp_is_megatrons_own(calls)


@contextlib.contextmanager
def slime_patch(slime: Any) -> Iterator[None]:
    """What slime's Megatron patch does: registers every router, wraps every top-k."""
    from megatron.core.transformer.moe import router as module

    topk_function = module.topk_routing_with_score_function

    class Wrapped:
        def get_replay_topk(self, scores, topk, num_groups, group_topk, default):
            values, ids = slime.get_routing_replay_compute_topk(default)(
                scores, topk, num_groups=num_groups, group_topk=group_topk
            )
            return values, ids.long()

    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        constructor(self, *args, **kwargs)
        slime.register_routing_replay(self)

    @functools.wraps(topk_function)
    def routed(*args: Any, **kwargs: Any) -> Any:
        kwargs["router_replay"] = kwargs.get("router_replay") or Wrapped()
        return topk_function(*args, **kwargs)

    r3patch.uninstall()
    constructor = module.TopKRouter.__init__  # without ours, which goes on top of slime's
    module.TopKRouter.__init__ = construct
    module.topk_routing_with_score_function = routed
    r3patch.install()
    try:
        yield
    finally:
        r3patch.uninstall()
        module.TopKRouter.__init__ = constructor
        module.topk_routing_with_score_function = topk_function
        r3patch.install()


@pytest.mark.feature(
    "module:megatron.core.transformer.moe.router_replay:RouterReplay.set_global_static_buffers"
)
def test_inference_buffers_have_main_layers(registry) -> None:
    """The buffer that Megatron's inference engine sets (0.17 and newer) has no MTP column."""
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    model = build(**NATIVE)
    buffer = torch.full((TOKENS, 2, TOPK), -1)
    RouterReplay.set_global_static_buffers(buffer)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    loss_of(model)
    assert (buffer >= 0).all()


@pytest.mark.parametrize("name", ["miles", "slime", "verl"])
def test_an_exception_in_an_mtp_constructor_of_each(name, request, monkeypatch) -> None:
    """No MTP router stays registered, and the next model is registered as ever."""
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer as Layer

    manager = request.getfixturevalue(name)
    if name == "verl":
        manager.apply_router_replay_patch()
    streams = {
        "miles": lambda: manager.replays,
        "slime": lambda: manager.RoutingReplay.all_routing_replays,
        "verl": lambda: manager.RouterReplay.router_instances,
    }[name]
    before = len(streams())
    with monkeypatch.context() as patch:
        patch.setattr(Layer, "__init__", fails_after(Layer.__init__))
        with pytest.raises(RuntimeError, match="boom"):
            build()
    assert len(streams()) == before + 2
    build()
    assert len(streams()) == before + 4
