"""Microbatch: what the device gets is what the routes say, whatever the sizes."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from r3patch import Routes
from r3patch.sessions._microbatch import Microbatch

CPU = torch.device("cpu")


def routers(layers: list[int], *, experts: int, topk: int) -> list[Any]:
    return [
        SimpleNamespace(name=f"{n}", layer_number=n, topk=topk, num_experts=experts) for n in layers
    ]


@pytest.mark.parametrize("seed", range(60))
def test_ids_gaps_and_tokens_come_out_as_they_went_in(seed: int) -> None:
    """Sizes that fill no word, gaps per layer, one and two bytes an id, a default device."""
    draw = random.Random(seed)
    tokens, layers, topk = draw.randint(0, 13), draw.randint(1, 4), draw.randint(1, 3)
    experts = draw.choice([5, 300])
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, layers, experts, generator=generator).topk(topk).indices
    per_layer = draw.random() < 0.5
    shape = (tokens, layers) if per_layer else (tokens,)
    valid = torch.rand(shape, generator=generator) < draw.choice([0.0, 0.5, 1.0])
    words = torch.randint(1000, (tokens,), generator=generator) if draw.random() < 0.5 else None
    numbers = [3 * n + 1 for n in range(layers)]
    routes = Routes(ids, numbers, valid, num_experts=experts, tokens=words)
    with torch.device("meta"):
        microbatch = Microbatch(routes, routers(numbers, experts=experts, topk=topk), probes=4)
        there = microbatch.to_device(CPU)
    for column in range(layers):
        mask = routes.mask[:, column]
        assert torch.equal(there.ids[column][mask].long(), ids[mask, column])
        gaps = there.gaps[column]
        positions = (~mask).nonzero().squeeze(1)
        assert positions.tolist() == ([] if gaps is None else gaps.tolist())
        start, stop = sorted((draw.randint(0, tokens), draw.randint(0, tokens)))
        with torch.device("meta"):
            first, last = microbatch.gaps_between(column, start, stop)
        inside = [n for n in positions.tolist() if start <= n < stop]
        assert positions[first:last].tolist() == inside
        probes = there.probes[column]
        assert probes is not None
        assert mask[probes].all()
        # One row is nothing to the alarm: there is no other to measure chance by.
        assert len(probes) == (0 if mask.sum() < 2 else min(4, int(mask.sum())))
    assert not microbatch.expert_load(routes).padding.any(), "nothing was spread"
    if words is None:
        assert there.tokens is None
    else:
        assert there.tokens is not None
        seen = routes.mask.any(dim=1)
        assert torch.equal(there.tokens, torch.where(seen, words, -1).int())


def test_spread_rows_stay_on_the_host_whatever_the_default_device() -> None:
    """Under one, the experts of rows without routes would be drawn there."""
    routes = Routes.missing(5, (1,), 2, 8)
    (router,) = routers([1], experts=8, topk=2)
    expected = Microbatch(routes, [router], missing="spread").to_device(CPU)
    with torch.device("meta"):
        there = Microbatch(routes, [router], missing="spread").to_device(CPU)
    assert torch.equal(there.ids[0], expected.ids[0])
