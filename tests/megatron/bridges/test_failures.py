"""A bridge that cannot govern: the model is built all the same, and status and verify say it."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import r3patch
from r3patch import _config, bridges

from .common import bridge_status, build, changed, main, mtp

pytestmark = pytest.mark.megatron


def test_an_unknown_shape_is_left_alone(miles: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A manager without what the bridge needs: failed, with the reason, a warning, no change."""
    del type(miles).get_topk_fn
    model = build()
    assert miles.replays == []
    assert all(router.router_replay is None for router in main(model))
    assert bridge_status("miles").state == "failed"
    assert "has no routing_replay_manager.get_topk_fn" in bridge_status("miles").detail
    assert "does not govern miles" in caplog.text


def test_a_manager_of_unknown_shape_is_not_asked(miles: Any) -> None:
    """Who replays is found out without a question that would raise."""
    router = main(build())[0]
    del miles.stage
    assert bridges.replaying(router, router.router_replay) is None


def test_the_native_bridge_has_a_variable_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way out that status names is the one that works."""
    from megatron.core.transformer.moe.router_replay import RouterReplay

    monkeypatch.delattr(RouterReplay, "global_router_replay_instances")
    model = build()
    with pytest.raises(r3patch.UnsupportedMegatronError, match="R3PATCH_NATIVE can turn the"):
        r3patch.verify(model)
    with _config.override(native="leave"):
        r3patch.verify(model)


def test_a_manager_that_raises(
    miles: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The model is built; the bridge is failed, with the reason, and a warning is there."""
    monkeypatch.setattr(miles, "register_to_module", changed)
    build()
    assert bridge_status("miles").state == "failed"
    assert "TypeError: register_to_module() wants a name" in bridge_status("miles").detail
    assert "does not govern miles" in caplog.text


def test_one_error_does_not_turn_a_bridge_off(miles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The routers after it are governed; status counts those that were not."""
    with monkeypatch.context() as patch:
        patch.setattr(miles, "register_to_module", changed)
        build()
    model = build()
    assert miles.replays == [router.routing_replay for router in main(model)]
    assert mtp(model)._forward_pre_hooks
    assert "wants a name (on 2 module(s))" in bridge_status("miles").detail


def test_a_router_that_fails_twice_counts_once(miles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An MTP router is governed again when its constructors are done."""
    monkeypatch.setattr("r3patch.bridges.miles.remove_streams", changed)
    build()
    assert "(on 1 module(s))" in bridge_status("miles").detail


def test_verify_refuses_and_says_how_to_go_on(miles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed bridge is a failed target of r3patch.status; without it the model is verified."""
    monkeypatch.setattr(miles, "register_to_module", changed)
    model = build()
    (failed,) = (t for t in r3patch.status().targets if t.state == "failed")
    assert failed == ("bridge miles", *bridge_status("miles")[1:])
    expected = r"Failed: bridge miles: TypeError: .*; R3PATCH_BRIDGES can turn the bridge"
    with pytest.raises(r3patch.UnsupportedMegatronError, match=expected):
        r3patch.verify(model)
    with _config.override(bridges=()):
        r3patch.verify(model)


def test_a_bridge_that_is_well_is_no_target(miles: Any) -> None:
    """r3patch.status() lists constructors, and what failed."""
    build()
    assert bridge_status("miles").state == "installed"
    assert not [t for t in r3patch.status().targets if t.name.startswith("bridge")]


def test_status_has_no_effects(miles: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Asking logs nothing and decides nothing: a manager that is repaired later is governed."""
    caplog.set_level(logging.INFO)
    kept = type(miles).get_topk_fn
    del type(miles).get_topk_fn
    assert bridge_status("miles").state == "failed"
    assert r3patch.status().targets[-1].name == "bridge miles"
    type(miles).get_topk_fn = kept
    assert bridge_status("miles").state == "installed"
    assert caplog.text == ""
    build()
    assert len(miles.replays) == 2


def test_uninstall_and_install_start_clean(
    miles: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Failures are forgotten, and warnings are said again, once for each install."""
    monkeypatch.setattr(miles, "register_to_module", changed)
    for times in (1, 2):
        build()
        assert caplog.text.count("does not govern miles") == times
        r3patch.uninstall()
        assert bridge_status("miles") == ("miles", "disabled", "r3patch is not installed")
        assert not [t for t in r3patch.status().targets if t.name.startswith("bridge")]
        r3patch.install()
        assert bridge_status("miles").state == "installed"


def test_installing_twice_governs_once(miles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second install() adds no second listener."""
    r3patch.install()
    governed: list[Any] = []
    monkeypatch.setattr("r3patch.bridges.miles.govern", lambda *args: governed.append(args[0]))
    r3patch.label(build(), scope="main")  # the MTP router is relabelled, others are not
    assert len(governed) == 2 + 2 + 1  # the MTP router once more when its layer is built


def test_governing_is_logged_once(miles: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One INFO line for each manager that is governed, however many routers."""
    caplog.set_level(logging.INFO)
    build()
    assert caplog.text.count("r3patch governs miles.utils.replay_base") == 1
    assert bridges.status()[0].name == "native"
