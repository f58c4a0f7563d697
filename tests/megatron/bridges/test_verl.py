"""verl's patch of TopKRouter, with MTP: its registry, its routing, its recompute."""

from __future__ import annotations

import copy
import copyreg
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import FULL

import r3patch

from .common import (
    Calls,
    as_map,
    assert_mtp_is_megatrons_own,
    build,
    loss_of,
    main,
    megatrons_routing,
    mtp,
    random_ids,
)

pytestmark = pytest.mark.megatron


@pytest.fixture(autouse=True)
def _empty_registry(verl: Any) -> None:
    verl.RouterReplay.router_instances.clear()


def test_without_its_patch_nothing_is_changed(verl: Any) -> None:
    """Who only imports verl has routers that route as the class does."""
    assert "routing" not in vars(mtp(build()))


@pytest.mark.parametrize("verl_first", [True, False])
def test_either_order_of_patches(verl: Any, verl_first: bool) -> None:
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
    verl.RouterReplay.set_global_router_replay_action(verl.RouterReplayAction.REPLAY_FORWARD)
    loss_of(model).backward()
    assert torch.equal(calls.maps(2)[0], as_map(ids[0]))
    with megatrons_routing():
        assert_mtp_is_megatrons_own(calls)


def test_full_recompute(verl: Any) -> None:
    """verl's two actions work under recompute, and the MTP layer is recomputed as it ran."""
    verl.apply_router_replay_patch()
    model = build(**FULL)
    calls = Calls(model)
    ids = [[random_ids(10 * step + layer) for layer in (2, 3)] for step in (0, 1)]
    losses = []
    for step in (0, 1):  # two microbatches in flight, as under 1F1B
        for router, rows in zip(main(model), ids[step], strict=True):
            router.router_replay.target_topk_idx = rows
        verl.RouterReplay.set_global_router_replay_action(verl.RouterReplayAction.REPLAY_FORWARD)
        losses.append(loss_of(model, seed=step))
        verl.RouterReplay.set_global_router_replay_action(verl.RouterReplayAction.REPLAY_BACKWARD)
    for loss in losses:
        loss.backward()
    for layer in (2, 3):
        expected = [as_map(ids[step][layer - 2]) for step in (0, 1, 0, 1)]
        assert all(map(torch.equal, calls.maps(layer), expected))
        assert len(calls.maps(layer)) == 4
    assert [call.in_backward for call in calls.mtp()] == [False, False, True, True]
    with megatrons_routing():
        assert_mtp_is_megatrons_own(calls)
    assert all(router.router_replay.replay_backward_list == [] for router in main(model))


def _by_nothing(group: object) -> tuple[type[None], tuple[()]]:
    """Process groups cannot be copied."""
    return type(None), ()


@pytest.mark.parametrize(
    "travel", [copy.deepcopy, lambda router: pickle.loads(pickle.dumps(router))]
)
def test_a_copied_mtp_router_still_routes_by_megatrons_own_code(
    verl: Any, travel: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deep-copied or pickled, with the weights of the copy and never by verl's routing."""
    verl.apply_router_replay_patch()
    router = mtp(build())
    monkeypatch.setitem(copyreg.dispatch_table, torch.distributed.ProcessGroup, _by_nothing)
    copied = travel(router)
    groups = {n: v for n, v in vars(router).items() if type(v).__name__ == "ProcessGroup"}
    vars(copied).update(groups)
    assert copied is not router
    with torch.no_grad():
        copied.weight.mul_(-1)
    hidden = torch.randn(8, 2, router.config.hidden_size)
    got = copied(hidden)
    with megatrons_routing():
        del copied.routing
        assert all(map(torch.equal, got, copied(hidden)))
    assert not torch.equal(got[1], router(hidden)[1])
