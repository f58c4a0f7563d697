"""What holds for each manager, and for several in one process."""

from __future__ import annotations

import contextlib
import os
import pickle
from typing import Any

import pytest
import torch

import r3patch
from r3patch import _config, bridges
from r3patch.bridges._attach import ManagerTap
from r3patch.bridges._shield import forget
from r3patch.labels import scope as scopes

from .common import (
    NATIVE,
    Calls,
    Foreign,
    as_map,
    assert_mtp_is_megatrons_own,
    bridge_status,
    build,
    fails_after,
    loss_of,
    main,
    mtp,
    random_ids,
)

pytestmark = pytest.mark.megatron


def test_two_models(foreign: Foreign) -> None:
    """Each model's main routers replay their own rows, its MTP router Megatron's choice."""
    models = [build(**foreign.config), build(**foreign.config)]
    routers = [router for model in models for router in main(model)]
    assert list(map(id, foreign.streams())) == [id(foreign.stream_of(r)) for r in routers]
    for seed, router in enumerate(routers):
        foreign.fill(foreign.stream_of(router), random_ids(seed))
    calls = [Calls(model) for model in models]
    foreign.start()
    for model in reversed(models):  # not in the order in which they were built
        loss_of(model)
    foreign.stop()
    for index, seen in enumerate(calls):
        assert torch.equal(seen.maps(2)[0], as_map(random_ids(2 * index)))
        assert torch.equal(seen.maps(3)[0], as_map(random_ids(2 * index + 1)))
        with foreign.without_it():
            assert_mtp_is_megatrons_own(seen)


def test_a_rebuilt_decoder(foreign: Foreign) -> None:
    """Live routers have streams of their own; only main routers that were built are registered."""
    model, donor = build(**foreign.config), build(**foreign.config)
    orphans = main(model)
    model.decoder = donor.decoder
    registered = [*orphans, *main(model)]
    assert list(map(id, foreign.streams())) == [id(foreign.stream_of(r)) for r in registered]
    for seed, router in enumerate(main(model)):
        foreign.fill(foreign.stream_of(router), random_ids(seed))
    calls = Calls(model)
    foreign.start()
    loss_of(model)
    foreign.stop()
    assert torch.equal(calls.maps(2)[0], as_map(random_ids(0)))
    assert torch.equal(calls.maps(3)[0], as_map(random_ids(1)))
    with foreign.without_it():
        assert_mtp_is_megatrons_own(calls)


def test_an_exception_in_an_mtp_constructor(
    foreign: Foreign, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No MTP router stays registered, and the next model is registered as ever."""
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer as Layer

    before = len(foreign.streams())
    with monkeypatch.context() as patch:
        patch.setattr(Layer, "__init__", fails_after(Layer.__init__))
        with pytest.raises(RuntimeError, match="boom"):
            build(**foreign.config)
    assert len(foreign.streams()) == before + 2
    build(**foreign.config)
    assert len(foreign.streams()) == before + 4


def test_a_head_labelled_later(foreign: Foreign) -> None:
    """label(head, scope="mtp") takes a router out of the manager that was built as a main one."""
    model = build(**foreign.config)
    router = main(model)[1]
    shields = len(mtp(model)._forward_pre_hooks)
    stream = foreign.stream_of(router)
    r3patch.label(router, scope="mtp")
    assert all(known is not stream for known in foreign.streams())
    assert len(foreign.streams()) == 1
    assert router.router_replay is None
    assert not hasattr(router, "routing_replay")
    assert len(router._forward_pre_hooks) == shields
    assert bridge_status(foreign.name).state == "installed"


def test_a_tap_asks_with_what_megatron_asks() -> None:
    """Groups reach the manager, and its ids reach Megatron as int64, whatever it keeps."""
    asked: list[Any] = []

    def wrap(topk_function: Any) -> Any:
        def topk(scores: torch.Tensor, topk: int, **groups: int) -> Any:
            asked.append((topk_function, topk, groups))
            return scores[:, :topk], torch.zeros(len(scores), topk, dtype=torch.int32)

        return topk

    _, ids = ManagerTap(wrap).get_replay_topk(torch.ones(3, 4), 2, 4, 1, build)
    assert asked == [(build, 2, {"num_groups": 4, "group_topk": 1})]
    assert ids.dtype == torch.int64


def test_a_registry_forgets_by_identity() -> None:
    """A stream that equals another is not the other."""
    first: list[int] = []
    second: list[int] = []
    registry = [first, second]
    forget(registry, second)
    assert len(registry) == 1
    assert registry[0] is first


def test_who_is_replaying(foreign: Foreign) -> None:
    """replaying() names the manager while it would act on a router, and nobody at rest."""
    model = build(**foreign.config)
    first, head = main(model)[0], mtp(model)
    own = first.router_replay
    assert bridges.replaying(first, own) is None
    foreign.start()
    assert bridges.replaying(first, own) == foreign.name
    assert bridges.replaying(head, head.router_replay) is None
    first.router_replay = object()  # a session has put its tap there
    assert bridges.replaying(first, own) == foreign.name
    foreign.stop()
    assert bridges.replaying(first, own) is None


def test_who_is_replaying_does_not_depend_on_who_is_governed(foreign: Foreign) -> None:
    """A manager that r3patch leaves alone still contradicts a session."""
    model = build(**foreign.config)
    first = main(model)[0]
    foreign.start()
    with _config.override(native="leave", bridges=()):
        assert bridges.replaying(first, first.router_replay) == foreign.name
    foreign.stop()


def test_uninstall_stops_governing(registry: list[Any]) -> None:
    """After uninstall() Megatron's registry is Megatron's again."""
    r3patch.uninstall()
    try:
        build(**NATIVE)
        assert len(registry) == 3
    finally:
        r3patch.install()


def test_bridges_off(miles: Any, slime: Any) -> None:
    """R3PATCH_BRIDGES=none: nothing is registered, nothing is taken away."""
    with _config.override(bridges=()):
        model = build()
        assert bridge_status("miles") == ("miles", "disabled", "by R3PATCH_BRIDGES")
        assert bridge_status("native").state == "installed"
    assert miles.replays == []
    assert slime.RoutingReplay.all_routing_replays == []
    assert not mtp(model)._forward_pre_hooks


def test_the_first_of_two_managers_drives(
    miles: Any, slime: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With miles and slime enabled one of them registers, and a warning says so."""
    model = build()
    assert len(miles.replays) == 2
    assert slime.RoutingReplay.all_routing_replays == []
    assert "two replay managers are enabled" in caplog.text
    monkeypatch.setenv("ROUTING_REPLAY_STAGE", "replay_forward")  # moves nothing of miles'
    assert bridges.replaying(main(model)[0], main(model)[0].router_replay) is None


def test_two_managers_are_both_kept_out(
    miles: Any, slime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An MTP call sees neither manager's stage, where a process has imported both."""
    router = mtp(build())
    miles.stage = "replay_forward"
    monkeypatch.setenv("ROUTING_REPLAY_STAGE", "replay_forward")
    seen, gating = [], router.gating

    def spied(hidden: torch.Tensor) -> Any:
        seen.append((miles.stage, os.environ["ROUTING_REPLAY_STAGE"]))
        return gating(hidden)

    monkeypatch.setattr(router, "gating", spied)
    router(torch.randn(2, 2, router.config.hidden_size))
    assert seen == [("fallthrough", "fallthrough")]
    assert (miles.stage, os.environ["ROUTING_REPLAY_STAGE"]) == ("replay_forward",) * 2


def test_hooks_on_mtp_routers_pickle(miles: Any, slime: Any) -> None:
    """A model with MTP is pickled as without r3patch: the hooks are no closures."""
    router = mtp(build())
    hooks = [*router._forward_pre_hooks.values(), *router._forward_hooks.values()]
    assert len(pickle.loads(pickle.dumps(hooks))) == 4


@pytest.mark.parametrize("name", ["miles", "slime", "verl"])
def test_a_router_labelled_main_again(
    name: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not kept out of replay in silence: nothing of the bridge stays, and a warning says."""
    manager = request.getfixturevalue(name)
    if name == "verl":
        manager.apply_router_replay_patch()
    router = mtp(build())
    r3patch.label(router, scope="main")
    assert not router._forward_pre_hooks
    assert not router._forward_hooks
    assert not router._forward_hooks_always_called
    assert "routing" not in vars(router)
    assert f"{name} does not replay on it" in caplog.text


@pytest.mark.parametrize("name", ["miles", "slime"])
def test_a_megatron_without_the_extension_point(
    name: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Before 0.16 nothing would read a stream: none is made, the model is built, and it is said."""
    manager = request.getfixturevalue(name)
    streams = manager.replays if name == "miles" else manager.RoutingReplay.all_routing_replays

    def old(router: Any) -> None:
        vars(router).pop("router_replay", None)
        bridges._govern(router)

    monkeypatch.setattr(scopes, "listeners", [old])
    with contextlib.suppress(AttributeError):  # the forward of 0.16 and newer is not asked for
        build()
    assert streams == []
    assert "no extension point for replay" in caplog.text
    assert all(status.state != "failed" for status in bridges.status())
