"""A core attention for the CPU: causal, with context parallelism, and for MLA.

Megatron's local ``DotProductAttention`` refuses context parallelism and MLA's head sizes
(megatron/core/transformer/dot_product_attention.py, 0.16.1 and 0.19.2).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


def use_cpu_attention(config: Any, spec: Any) -> None:
    """Put `CPUAttention` into a layer or block spec where the local attention does not do."""
    if config.context_parallel_size > 1 or getattr(config, "multi_latent_attention", False):
        _replace(spec, set())


def _replace(spec: Any, seen: set[int]) -> None:
    if id(spec) in seen:
        return
    seen.add(id(spec))
    if isinstance(spec, (list, tuple)):
        for item in spec:
            _replace(item, seen)
    elif dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        for field in dataclasses.fields(spec):
            if field.name == "core_attention":
                setattr(spec, field.name, CPUAttention)
            else:
                _replace(getattr(spec, field.name), seen)


class CPUAttention(torch.nn.Module):
    """Causal softmax attention over all context-parallel ranks, in zigzag order."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.config = config
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``[s, b, heads, d]`` each, ``s`` of this rank; returns ``[s, b, heads * d_value]``."""
        from megatron.core import parallel_state

        size = parallel_state.get_context_parallel_world_size()
        rank = parallel_state.get_context_parallel_rank()
        length = query.shape[0]
        if size > 1:
            group = parallel_state.get_context_parallel_group()
            gather: Any = _Gather.apply
            key, value = gather(key, group), gather(value, group)
        places = torch.cat([_places(length, size, r) for r in range(size)])
        mask = (places.unsqueeze(0) <= _places(length, size, rank).unsqueeze(1)).to(query.device)
        repeat = query.shape[2] // key.shape[2]
        q, k, v = (
            x.permute(1, 2, 0, 3)
            for x in (query, *(x.repeat_interleave(repeat, dim=2) for x in (key, value)))
        )
        scale = self.softmax_scale or q.shape[-1] ** -0.5
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
        out = torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v
        return out.permute(2, 0, 1, 3).flatten(2)


def _places(length: int, size: int, rank: int) -> torch.Tensor:
    """The places in the sequence of a rank's tokens: chunks rank and ``2 * size - 1 - rank``."""
    if size == 1:
        return torch.arange(length)
    chunks = torch.arange(length * size).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


class _Gather(torch.autograd.Function):
    """Concatenates the ranks' parts along dim 0; each rank gets the sum of its part's gradients."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        torch.distributed.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        whole = gradients[0].contiguous()
        torch.distributed.all_reduce(whole, group=ctx.group)
        return whole.chunk(ctx.group.size())[ctx.group.rank()], None
