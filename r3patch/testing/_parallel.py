"""Weights that do not depend on how the model is cut, so that runs can be compared."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch


@torch.no_grad()
def seed_parameters(model: Any, seed: int = 0) -> None:
    """Fill every parameter and expert bias from its place in the whole model.

    The shards that ranks hold under tensor, pipeline and expert parallelism are then parts of one
    and the same model: what a single process builds with this seed.

    Args:
        model: a module or the list of a rank's chunks, as `tiny_model` gives them.
        seed: another seed is another model.
    """
    chunks: Sequence[torch.nn.Module] = [model] if isinstance(model, torch.nn.Module) else model
    for chunk in chunks:
        for name, tensor in _tensors(chunk):
            whole = _whole(name, tensor, chunk)
            tensor.copy_(_values(whole, name, seed, tensor))


def _tensors(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and expert biases by their names in the whole model."""
    for name, parameter in chunk.named_parameters():
        yield _global_name(chunk, name), parameter
    for name, buffer in chunk.named_buffers():
        if name.endswith("expert_bias"):
            yield _global_name(chunk, name), buffer


def _global_name(chunk: torch.nn.Module, name: str) -> str:
    """The name with layers counted over pipeline stages and experts over expert ranks."""
    from megatron.core import parallel_state

    decoder = re.match(r"(?:module\.)*(decoder\.layers\.\d+)\.", name)
    if decoder:
        layer = chunk.get_submodule(name[: decoder.end() - 1])
        name = f"decoder.layer{layer.layer_number}.{name[decoder.end() :]}"

    def renumber(match: re.Match[str]) -> str:
        local = int(match.group(1))
        count = parallel_state.get_expert_model_parallel_world_size()
        per_rank = _num_experts(chunk) // count
        return f"experts.{local + parallel_state.get_expert_model_parallel_rank() * per_rank}."

    return re.sub(r"local_experts\.(\d+)\.", renumber, name)


def _num_experts(chunk: torch.nn.Module) -> int:
    return int(chunk.config.num_moe_experts)  # type: ignore[union-attr, arg-type]


def _whole(name: str, shard: torch.Tensor, chunk: torch.nn.Module) -> tuple[int, int, int, int]:
    """How the tensor is cut: (dimension, parts, own part, blocks that are cut each on its own)."""
    from megatron.core import parallel_state

    if not getattr(shard, "tensor_model_parallel", False):
        return (0, 1, 0, 1)
    if ".experts." in name:
        size = parallel_state.get_expert_tensor_parallel_world_size()
        rank = parallel_state.get_expert_tensor_parallel_rank()
    else:
        size = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
    gated = "linear_fc1" in name and chunk.config.gated_linear_unit  # type: ignore[union-attr]
    return (shard.partition_dim, size, rank, 2 if gated else 1)  # type: ignore[attr-defined]


def _values(
    cut: tuple[int, int, int, int], name: str, seed: int, shard: torch.Tensor
) -> torch.Tensor:
    dim, size, rank, blocks = cut
    shape = list(shard.shape)
    shape[dim] *= size
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    if name.endswith("expert_bias"):
        return torch.rand(shape, generator=generator) * 0.1 - 0.05
    if len(shape) == 1:  # a norm's weight, or a bias
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    whole = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
    parts = [block.chunk(size, dim=dim)[rank] for block in whole.chunk(blocks, dim=dim)]
    return torch.cat(parts, dim=dim)
