"""Batches and steps: Megatron's own schedules, one microbatch or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from r3patch.testing._models import VOCABULARY

Batch = dict[str, Any]


def random_batches(
    *,
    num_microbatches: int = 2,
    micro_batch_size: int = 2,
    seq_length: int = 16,
    vocab_size: int = VOCABULARY,
    seed: int = 0,
) -> list[Batch]:
    """Microbatches of random tokens, whole ones: `train_step` cuts them for context parallelism.

    Returns:
        For each microbatch what ``GPTModel.forward`` takes: ``input_ids``, ``labels`` and
        ``position_ids`` ``[micro_batch_size, seq_length] int64``, and ``attention_mask``.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (num_microbatches, micro_batch_size, seq_length + 1)
    tokens = torch.randint(vocab_size, shape, generator=generator)
    mask = torch.ones(1, 1, seq_length, seq_length, dtype=torch.bool).triu(1)
    return [
        {
            "input_ids": part[:, :-1].contiguous(),
            "labels": part[:, 1:].contiguous(),
            "position_ids": torch.arange(seq_length).expand(micro_batch_size, seq_length),
            "attention_mask": mask,
        }
        for part in tokens
    ]


def train_step(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Batch],
    *,
    forward_only: bool = False,
    before_forward: Callable[[torch.nn.Module, int], None] | None = None,
) -> list[torch.Tensor]:
    """Forward and backward over all microbatches by the schedule that the parallel sizes ask for.

    Args:
        chunks: of this rank, as `tiny_model` gives them.
        batches: the whole microbatches, the same on every rank of a model.
        forward_only: no backward.
        before_forward: called in ``forward_step`` with the chunk and the number of the microbatch.

    Returns:
        On the last pipeline stage the mean loss of each microbatch over this rank's tokens; on
        other stages nothing. Gradients are left in ``.grad``.
    """
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    def forward_step(data: Iterator[tuple[int, Batch]], model: torch.nn.Module) -> Any:
        number, batch = next(data)
        if before_forward is not None:
            before_forward(model, number)
        return model(**on_this_rank(batch)), _mean

    _, length = batches[0]["input_ids"].shape
    data = [iter(enumerate(batches)) for _ in chunks]
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data if len(chunks) > 1 else data[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=batches[0]["input_ids"].shape[0],
        forward_only=forward_only,
    )
    return [loss["loss"] for loss in losses]


def _mean(loss: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    mean = loss.float().mean()
    return mean, {"loss": mean.detach().clone()}  # the schedule scales the first in place


def on_this_rank(batch: Batch) -> Batch:
    """The part of a microbatch that this context-parallel rank gets, in zigzag order."""
    from megatron.core import parallel_state

    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return batch
    rank = parallel_state.get_context_parallel_rank()
    cut = {}
    for name in ("input_ids", "labels", "position_ids"):
        parts = batch[name].chunk(2 * size, dim=1)
        cut[name] = torch.cat([parts[rank], parts[2 * size - 1 - rank]], dim=1)
    return {**batch, **cut}
