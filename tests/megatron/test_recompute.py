"""Replay under recompute, in any order: maps and gradients."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny import (
    FULL_MTP,
    SELECTIVE,
    assert_close,
    build,
    gradients,
    loss_of,
    random_routes,
)
from torch.utils.checkpoint import checkpoint

import r3patch

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("cpu")]


# Recompute in any order


def orders(model: Any, schedule: str) -> None:
    """Runs three microbatches (seeds 1, 2, 3) by a schedule of forwards f, backwards b, evals e."""
    losses: dict[int, torch.Tensor] = {}
    for move in schedule.split():
        seed = int(move[1])
        if move[0] == "f":
            losses[seed] = loss_of(model, seed)
        elif move[0] == "b":
            losses[seed].backward()
        else:
            with torch.no_grad():
                loss_of(model, seed)


@pytest.mark.parametrize("recompute", [FULL_MTP, SELECTIVE], ids=["full", "selective_moe"])
@pytest.mark.parametrize(
    "schedule",
    [
        "f1 f2 f3 b1 b2 b3",
        "f1 f2 f3 b3 b1 b2",
        "f1 f2 b1 f3 b2 b3",
        "f1 e4 f2 e5 b2 f3 e4 b1 e5 b3",
    ],
)
def test_recompute_in_any_order(recompute: Any, schedule: Any) -> None:
    """Whatever the order of forwards, backwards and evaluations, gradients are the plain run's."""

    def run(**overrides: Any) -> dict[str, torch.Tensor]:
        model = build(**overrides)
        seeds = [int(move[1]) for move in schedule.split() if move[0] in "fe"]
        with r3patch.replay(model, [random_routes(model, seed) for seed in seeds]):
            orders(model, schedule)
        return gradients(model)

    assert_close(run(**recompute), run())


@pytest.mark.parametrize("outer_reentrant", [True, False])
@pytest.mark.parametrize("recompute", [{}, FULL_MTP, SELECTIVE], ids=["plain", "full", "selective"])
def test_the_whole_model_in_a_checkpoint(recompute: Any, outer_reentrant: bool) -> None:
    """A checkpoint of the user's around Megatron's own nests, and gradients are the plain run's."""

    def run(wrap: bool, **overrides: Any) -> dict[str, torch.Tensor]:
        model = build(**overrides)
        microbatches = [random_routes(model, seed) for seed in (11, 12)]
        hook = torch.zeros((), requires_grad=True)
        with r3patch.replay(model, microbatches):
            losses = []
            for seed in (1, 2):

                def forward(_: torch.Tensor, seed: int = seed) -> torch.Tensor:
                    return loss_of(model, seed)

                losses.append(
                    checkpoint(forward, hook, use_reentrant=outer_reentrant)
                    if wrap
                    else forward(hook)
                )
            for loss in reversed(losses):
                loss.backward()
        return gradients(model)

    assert_close(run(True, **recompute), run(False))


@pytest.mark.parametrize("recompute", [FULL_MTP, SELECTIVE], ids=["full", "selective_moe"])
def test_backward_in_another_thread(recompute: Any) -> None:
    """Autograd's CUDA workers are threads of their own: state on the tap is visible there."""
    model = build(**recompute)
    microbatches = [random_routes(model, 11)]
    with r3patch.replay(model, microbatches):
        loss = loss_of(model, 1)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    got, plain = gradients(model), build()
    with r3patch.replay(plain, microbatches):
        loss_of(plain, 1).backward()
    assert_close(got, gradients(plain))
