"""What the tests of the bridges share: a model, its routes, and the managers by one handle."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

import r3patch
from r3patch import bridges, testing
from r3patch.bridges.verl import own_routing
from r3patch.labels.patch import TargetStatus

NATIVE = {"moe_enable_routing_replay": True}
EXPERTS, TOPK, BATCH, LENGTH = 16, 4, 2, 12
TOKENS = BATCH * LENGTH


def build(**overrides: Any) -> Any:
    """A GPT of one dense layer, MoE layers 2 and 3, and one MTP layer."""
    config = {"num_layers": 3, "num_moe_experts": EXPERTS, "moe_router_topk": TOPK, **overrides}
    (model,) = testing.tiny_model(**{"multi_latent_attention": False, **config})
    testing.seed_parameters(model)
    return model.train()


def loss_of(model: Any, seed: int = 1) -> Any:
    (batch,) = testing.random_batches(
        num_microbatches=1, micro_batch_size=BATCH, seq_length=LENGTH, seed=seed
    )
    return model(**batch).mean()


def random_ids(seed: int) -> torch.Tensor:
    """``[num_tokens, topk] int64``, distinct in a row."""
    noise = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))
    return noise.topk(TOPK).indices


def as_map(ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(ids), EXPERTS, dtype=torch.bool).scatter(1, ids.long(), True)


def main(model: Any) -> list[Any]:
    return [info.module for info in r3patch.routers(model, "main")]


def mtp(model: Any) -> Any:
    (info,) = r3patch.routers(model, "mtp")
    return info.module


class Calls(testing.RoutingCalls):
    """Every routing call; the maps of a main router by its layer number."""

    def maps(self, layer: int) -> list[torch.Tensor]:
        key = ("main", layer)
        return [c.routing_map for c in self if (c.info.scope, c.info.layer_number) == key]

    def mtp(self) -> list[testing.RoutingCall]:
        return [call for call in self if call.info.scope == "mtp"]


def assert_mtp_is_megatrons_own(calls: Calls) -> None:
    """On the same input and weights, in a model that no manager has seen, to the bit."""
    plain = mtp(build())
    assert calls.mtp()
    for call in calls.mtp():
        with torch.set_grad_enabled(call.grad_enabled):
            own_probs, own_map = plain(call.input)
        assert torch.equal(own_probs, call.probs)
        assert torch.equal(own_map, call.routing_map)


def bridge_status(name: str) -> TargetStatus:
    (found,) = (status for status in bridges.status() if status.name == name)
    return found


def changed(*args: Any) -> None:
    """What a manager of another version does where ours calls it."""
    raise TypeError("register_to_module() wants a name")


def fails_after(function: Any) -> Any:
    """The function, and then an error."""

    def fails(self: Any, *args: Any, **kwargs: Any) -> None:
        function(self, *args, **kwargs)
        raise RuntimeError("boom")

    return fails


@contextlib.contextmanager
def forked(register: Callable[[Any], Any], wrap: Callable[[Any], Any]) -> Iterator[None]:
    """What a fork's source does: registers every router, wraps every top-k, whoever calls."""
    from megatron.core.transformer.moe import router as module

    topk_function = module.topk_routing_with_score_function

    class Wrapped:
        def get_replay_topk(
            self, scores: Any, topk: int, num_groups: Any, group_topk: Any, default: Any
        ) -> Any:
            values, ids = wrap(default)(scores, topk, num_groups=num_groups, group_topk=group_topk)
            return values, ids.long()

    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        constructor(self, *args, **kwargs)
        register(self)

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


@contextlib.contextmanager
def megatrons_routing() -> Iterator[None]:
    """Megatron's own ``routing`` in the place of verl's copy, to compare with."""
    from megatron.core.transformer.moe.router import TopKRouter

    patched, TopKRouter.routing = TopKRouter.routing, own_routing()
    try:
        yield
    finally:
        TopKRouter.routing = patched


@dataclass
class Foreign:
    """A manager, and how its users work with it."""

    name: str
    streams: Callable[[], list[Any]]
    stream_of: Callable[[Any], Any]
    """The stream of a router."""
    fill: Callable[[Any, torch.Tensor], Any]
    """Give a stream the ids of one microbatch."""
    start: Callable[[], Any]
    """Replay in what runs next."""
    stop: Callable[[], Any]
    config: dict[str, Any] = field(default_factory=dict)
    without_it: Callable[[], AbstractContextManager[None]] = nullcontext
