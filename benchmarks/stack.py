"""Routers of stock Megatron without the rest of a transformer, and checkpoints around them.

A `Stack` is a residual stack of real ``TopKRouter`` modules, each with one matrix in the place of
its experts. What a session does to a model it does to a stack, thousands of times a minute.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from r3patch import Routes, testing

# Before Megatron is imported: its jit_fuser is torch.compile, which wants a C++ compiler.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
Region = Callable[[torch.Tensor], torch.Tensor]
#: A layer's index, or a checkpoint (a key of `CHECKPOINTS`) around a sequence of them.
Nest = int | tuple[str, tuple["Nest", ...]]

#: Router settings of `testing.tiny_config`: score functions, expert bias, groups.
ROUTINGS: dict[str, dict[str, Any]] = {
    "softmax": {"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False},
    "pre_softmax": {
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "moe_router_pre_softmax": True,
    },
    "sigmoid_bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    "groups": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
    },
}


def expect_foreign_routes() -> None:
    """Routes are foreign on purpose here, and the alarm would say so of every session."""
    logging.getLogger("r3patch").setLevel(logging.ERROR)


class Block(torch.nn.Module):
    """``x + f(gate weights @ experts)``: the gate weights matter, and so does each expert."""

    def __init__(self, router: Any, generator: torch.Generator) -> None:
        super().__init__()
        self.router = router
        experts, hidden = router.weight.shape
        mixing = torch.randn(experts, hidden, generator=generator) * experts**-0.5
        self.experts = torch.nn.Parameter(mixing)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probs, _ = self.router(x)
        return x + torch.tanh(probs.to(x.dtype) @ self.experts).view_as(x)


class Stack(torch.nn.Module):
    """Blocks one after the other, in checkpoints or not: ``[s, b, hidden] -> [s, b, hidden]``.

    Args:
        routing: a key of `ROUTINGS`.
        layers: how many.
        first: the layer number of the first; the numbers of a later pipeline chunk start higher.
        total: ``num_layers`` of the config, all chunks together.
        overrides: fields of the config.
    """

    def __init__(
        self, routing: str, layers: int, *, first: int = 1, total: int = 0, **overrides: Any
    ) -> None:
        super().__init__()
        fields = {
            "num_moe_experts": 16,
            "moe_router_topk": 4,
            "moe_shared_expert_intermediate_size": None,
            **ROUTINGS[routing],
            **overrides,
        }
        generator = torch.Generator().manual_seed(first)
        routers = [_router(fields, total or layers, first + i, generator) for i in range(layers)]
        self.config = routers[0].config
        self.scale = torch.nn.Parameter(torch.ones(self.config.hidden_size))
        self.blocks = torch.nn.ModuleList(Block(router, generator) for router in routers)
        self.nest: tuple[Nest, ...] = tuple(range(layers))
        self.hidden: list[torch.Tensor] = []  # what each outermost part of the nest returned
        self.train()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        hidden = []
        for part in self.nest:
            x = self._run(part, x)
            hidden.append(x)
        self.hidden = hidden
        return x

    def _run(self, part: Nest, x: torch.Tensor) -> torch.Tensor:
        if isinstance(part, int):
            return self.blocks[part](x)  # type: ignore[no-any-return]
        kind, inner = part

        def region(x: torch.Tensor) -> torch.Tensor:
            return functools.reduce(lambda y, p: self._run(p, y), inner, x)

        return CHECKPOINTS[kind](region, x)

    @property
    def routers(self) -> list[Any]:
        return [block.router for block in self.blocks]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(router.layer_number for router in self.routers)


def _router(fields: dict[str, Any], total: int, number: int, generator: torch.Generator) -> Any:
    """A router as Megatron's MoE layer builds it, without the layer, and numbered."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    config = testing.tiny_config(
        **{"num_layers": 1, "moe_layer_freq": [1], "mtp_num_layers": None, **fields}
    )
    router = TopKRouter(config=config, pg_collection=get_default_pg_collection())
    router.config.num_layers = total
    router.layer_number = number
    with torch.no_grad():
        # Logits of about one, so that gate weights and gradients are of one order of magnitude.
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * 0.2)
        if getattr(router, "expert_bias", None) is not None:
            bias = torch.empty(router.expert_bias.shape)  # drawn on the CPU, whatever the device
            router.expert_bias.copy_(bias.uniform_(-0.05, 0.05, generator=generator))
    return router


def random_routes(
    layers: Sequence[int],
    num_tokens: int,
    *,
    experts: int,
    topk: int,
    seed: int,
    gaps: float = 0.0,
) -> Routes:
    """Routes that a model would not choose, a fraction ``gaps`` of the rows without any."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(num_tokens, len(layers), experts, generator=generator)
    valid = torch.ones(num_tokens, dtype=torch.bool)
    valid[torch.randperm(num_tokens, generator=generator)[: round(gaps * num_tokens)]] = False
    return Routes(noise.topk(topk).indices, tuple(layers), valid, num_experts=experts)


class Forced:
    """Megatron's extension point as plainly as can be: chosen scores are lifted over all others."""

    def __init__(self, rows: Routes | None, layer: int) -> None:
        column = None if rows is None else rows.select((layer,))
        self.ids = None if column is None else column.experts[:, 0].long()
        self.valid = None if column is None or column.valid is None else column.valid[:, 0]
        self.margin = float("inf")  # how near the model's own choice was to another one
        self.layer_number = layer

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: Any, group_topk: Any, default: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            _, ids = default(scores, topk, num_groups, group_topk)
            if self.ids is not None:
                forced = self.ids.to(ids.device)
                valid = None if self.valid is None else self.valid.to(ids.device)
                ids = forced if valid is None else forced.where(valid[:, None], ids)
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, True)
            ranked = scores.sort(dim=1, descending=True).values
            self.margin = float((ranked[:, topk - 1] - ranked[:, topk]).min())
        _, ids = torch.topk(scores.masked_fill(~chosen, -torch.inf), topk, dim=1)
        return scores.gather(1, ids), ids


# Every way to repeat a forward in backward that a Megatron model meets.


def _reentrant(region: Region, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(region, x, use_reentrant=True)  # type: ignore[no-any-return]


def _non_reentrant(region: Region, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(region, x, use_reentrant=False)  # type: ignore[no-any-return]


def _megatron(region: Region, x: torch.Tensor) -> torch.Tensor:
    from megatron.core import tensor_parallel

    return tensor_parallel.checkpoint(region, False, x)  # type: ignore[no-any-return]


def _selective(*saved: Any) -> Callable[[Region, torch.Tensor], torch.Tensor]:
    """Non-reentrant, the results of some operations saved instead of recomputed."""

    def run(region: Region, x: torch.Tensor) -> torch.Tensor:
        contexts = functools.partial(create_selective_checkpoint_contexts, list(saved))
        return checkpoint(  # type: ignore[no-any-return]
            region, x, use_reentrant=False, context_fn=contexts
        )

    return run


_aten = torch.ops.aten
CHECKPOINTS: dict[str, Callable[[Region, torch.Tensor], torch.Tensor]] = {
    "R": _reentrant,
    "N": _non_reentrant,
    "M": _megatron,
    "S": _selective(_aten.mm.default),
    "T": _selective(_aten.topk.default, _aten.sort.stable, _aten.gather.default),
}


def leaves(nest: Sequence[Nest]) -> Iterator[int]:
    """The layers of a nest, in order."""
    for part in nest:
        if isinstance(part, int):
            yield part
        else:
            yield from leaves(part[1])
