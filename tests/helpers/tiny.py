"""A small MoE + MTP model on stock Megatron, and how to hold a session against it.

For the tests in tests/megatron: `build`, `batch` and `random_routes` make the parts, `step` runs
them, `Calls` and `assert_maps` look at what the routers did.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import r3patch
from r3patch import Routes, testing

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
#: 0.18 cannot recompute a model with MTP: its own call has an argument that its function lacks.
RECOMPUTES_MTP = pytest.mark.feature(
    "takes:megatron.core.transformer.multi_token_prediction:"
    "MultiTokenPredictionLayer._checkpointed_forward:padding_mask"
)
FULL_MTP = pytest.param(FULL, marks=RECOMPUTES_MTP)
RECOMPUTE = pytest.mark.parametrize(
    "recompute",
    [{}, FULL_MTP, SELECTIVE],
    ids=["no_recompute", "full", "selective_moe"],
)
ROUTING = pytest.mark.parametrize(
    "routing",
    [
        {"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False},
        {
            "moe_router_score_function": "softmax",
            "moe_router_enable_expert_bias": False,
            "moe_router_pre_softmax": True,
        },
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": False},
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
        {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
        },
    ],
    ids=["softmax", "pre_softmax", "sigmoid", "expert_bias", "group_limited"],
)

BATCH, LENGTH = 2, 12
TOKENS = BATCH * LENGTH
EXPERTS, TOPK = 16, 4


def build(**overrides: Any) -> Any:  # torch types attributes of a module as Tensor | Module
    """A small MoE + MTP model; the expert bias is filled, so that it matters."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()  # it keeps the number of depths of the first model
    torch.manual_seed(0)
    own: dict[str, Any] = {
        "num_layers": 3,
        "num_moe_experts": EXPERTS,
        "multi_latent_attention": False,
    }
    config = {**own, **overrides}
    (model,) = testing.tiny_model(**config)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            bias = torch.empty(buffer.shape)
            buffer.copy_(bias.uniform_(-0.05, 0.05, generator=torch.Generator().manual_seed(1)))
    return model.to(torch.cuda.current_device()).train()  # tests/gpu; the CPU elsewhere


def batch(seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(64, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    return {
        "input_ids": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "position_ids": torch.arange(LENGTH).expand(BATCH, LENGTH),
        "attention_mask": torch.triu(torch.ones(1, 1, LENGTH, LENGTH), 1).bool(),
    }


def layers(model: Any) -> tuple[int, ...]:
    return tuple(info.layer_number or 0 for info in r3patch.routers(model, "main"))


class Foreign:
    """How often routes were made that no model has chosen: the alarm is right to ring for them."""

    made = 0


def random_routes(model: Any, seed: int, num_tokens: int = TOKENS) -> Routes:
    """Routes that the model would not choose: distinct random experts per row."""
    Foreign.made += 1
    noise = torch.rand(
        num_tokens, len(layers(model)), EXPERTS, generator=torch.Generator().manual_seed(seed)
    )
    return Routes(noise.topk(TOPK).indices, layers(model), num_experts=EXPERTS)


def with_tokens(routes: Routes, seed: int) -> Routes:
    """The same routes, which know that they are of `batch`."""
    tokens = batch(seed)["input_ids"].t().flatten()
    return Routes(routes.experts, routes.layers, routes.valid, num_experts=EXPERTS, tokens=tokens)


def with_gaps(routes: Routes) -> Routes:
    valid = torch.arange(routes.num_tokens) % 3 != 0
    return Routes(routes.experts, routes.layers, valid, num_experts=routes.num_experts)


def shuffled(routes: Routes) -> Routes:
    """The same sets, the ids of each row in another order."""
    order = torch.randperm(routes.topk, generator=torch.Generator().manual_seed(3))
    return Routes(routes.experts[..., order], routes.layers, num_experts=routes.num_experts)


def here(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch where Megatron runs: on the card in tests/gpu, on the CPU elsewhere."""
    device = torch.cuda.current_device()
    return {name: part.to(device) for name, part in batch.items()}


def loss_of(model: Any, seed: int) -> torch.Tensor:
    loss: torch.Tensor = model(**here(batch(seed))).mean()
    return loss


def step(model: Any, seeds: tuple[int, ...] = (1, 2)) -> dict[str, torch.Tensor]:
    """One step, a backward after each forward: losses and gradients by name."""
    model.zero_grad()
    result = {}
    for seed in seeds:
        loss = loss_of(model, seed)
        loss.backward()
        result[f"loss {seed}"] = loss.detach()
    return result | gradients(model)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert not different


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


class Calls(testing.RoutingCalls):
    """Every routing call; the maps of main routers by layer number."""

    def main(self, *, in_backward: bool) -> dict[int, list[torch.Tensor]]:
        maps: dict[int, list[torch.Tensor]] = {}
        for call in self:
            if call.info.scope == "main" and call.in_backward == in_backward:
                maps.setdefault(call.info.layer_number or 0, []).append(call.routing_map.cpu())
        return maps


def wanted_map(routes: Routes, layer: int) -> torch.Tensor:
    ids = routes.select((layer,)).experts[:, 0].long()
    return torch.zeros(len(ids), routes.num_experts, dtype=torch.bool).scatter(1, ids, True)


def assert_maps(maps: dict[int, list[torch.Tensor]], microbatches: list[Routes]) -> None:
    for layer in microbatches[0].layers:
        assert len(maps[layer]) == len(microbatches)
        for got, routes in zip(maps[layer], microbatches, strict=True):
            assert torch.equal(got, wanted_map(routes, layer))


def assert_untouched(model: Any) -> None:
    for info in r3patch.routers(model):
        assert info.module.router_replay is None
    assert not model._forward_hooks
