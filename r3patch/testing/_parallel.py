"""Weights that do not depend on how the model is cut, so that runs can be compared."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch


def seed_parameters(model: Any, seed: int = 0) -> None:
    """Fill every parameter and expert bias from its place in the whole model.

    The shards that ranks hold under tensor, pipeline and expert parallelism are then parts of one
    and the same model: what a single process builds with this seed.

    Args:
        model: a module or the list of a rank's chunks, as `tiny_model` gives them.
        seed: another seed is another model.
    """
    fill_parameters(model, lambda name, shape: _values(name, shape, seed))


@torch.no_grad()
def fill_parameters(
    model: Any, values: Callable[[str, tuple[int, ...]], torch.Tensor | None]
) -> None:
    """Copy this rank's part of ``values(name, shape)`` into every parameter and expert bias.

    Args:
        model: a module or the list of a rank's chunks.
        values: gets the name in the whole model and the shape of the whole tensor, and gives that
            tensor, or None to leave the parameter as it is.
    """
    chunks: Sequence[torch.nn.Module] = [model] if isinstance(model, torch.nn.Module) else model
    for chunk in chunks:
        for name, tensor in _tensors(chunk):
            cut = _cut(name, tensor, chunk)
            shape = list(tensor.shape)
            shape[cut.dim] *= cut.size
            whole = values(name, tuple(shape))
            if whole is not None:
                tensor.copy_(cut.part(whole))


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


class _Cut(NamedTuple):
    """How tensor parallelism cuts a tensor."""

    dim: int = 0
    size: int = 1
    rank: int = 0
    blocks: int = 1  # cut each on its own

    def part(self, whole: torch.Tensor) -> torch.Tensor:
        blocks: Sequence[torch.Tensor] = whole.chunk(self.blocks, dim=self.dim)
        parts = [block.chunk(self.size, dim=self.dim)[self.rank] for block in blocks]
        return torch.cat(parts, dim=self.dim)


def _cut(name: str, shard: torch.Tensor, chunk: torch.nn.Module) -> _Cut:
    from megatron.core import parallel_state

    if not getattr(shard, "tensor_model_parallel", False):
        return _Cut()
    if ".experts." in name:
        size = parallel_state.get_expert_tensor_parallel_world_size()
        rank = parallel_state.get_expert_tensor_parallel_rank()
    else:
        size = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
    gated = "linear_fc1" in name and chunk.config.gated_linear_unit  # type: ignore[union-attr]
    return _Cut(shard.partition_dim, size, rank, 2 if gated else 1)  # type: ignore[attr-defined]


def _values(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    if name.endswith("expert_bias"):
        return torch.rand(shape, generator=generator) * 0.1 - 0.05
    if len(shape) == 1:  # a norm's weight, or a bias
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    scale: float = shape[-1] ** -0.5
    return torch.randn(shape, generator=generator) * scale
