"""A manager that is switched on while a session is open: whose rows would count is no guess."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import r3patch
from r3patch import Routes

from .common import EXPERTS, Foreign, build, loss_of, main, random_ids

pytestmark = pytest.mark.megatron

FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def session_of(model: Any, kind: str) -> Any:
    if kind == "record":
        return r3patch.record(model)
    ids = torch.stack([random_ids(seed) for seed in (2, 3)], dim=1)
    return r3patch.replay(model, [Routes(ids, (2, 3), num_experts=EXPERTS)], alarm="off")


@pytest.mark.parametrize("kind", ["record", "replay"])
def test_before_a_forward(foreign: Foreign, kind: str) -> None:
    """The first router that is called names the manager; afterwards every router is as it was."""
    model = build(**foreign.config)
    before = [router.router_replay for router in main(model)]

    def run() -> None:
        with session_of(model, kind):
            foreign.start()
            loss_of(model)

    with pytest.raises(r3patch.ReplayError, match=f"manager {foreign.name} was switched on during"):
        run()
    foreign.stop()
    assert [router.router_replay for router in main(model)] == before
    loss_of(model).backward()


@pytest.mark.parametrize("kind", ["record", "replay"])
def test_before_a_recompute(foreign: Foreign, kind: str) -> None:
    """Between a forward and its backward, too: the recompute names the manager."""
    model = build(**foreign.config, **FULL)

    def run() -> None:
        with session_of(model, kind):
            loss = loss_of(model)
            foreign.start()
            loss.backward()

    with pytest.raises(r3patch.ReplayError, match=f"manager {foreign.name} was switched on during"):
        run()
    foreign.stop()
