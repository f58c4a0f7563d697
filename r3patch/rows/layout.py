"""Layout: from the rows of samples to the rows of this rank's microbatch, in the router's order.

Pure arithmetic on sizes and ranks: a controller computes any rank's part without a process group.
Megatron's router flattens ``[s, b, hidden]`` to ``[s * b, hidden]``, sequence-major
(``TopKRouter.routing`` in megatron/core/transformer/moe/router.py, all versions). Which tokens
stand along ``s`` is the choice of whoever makes the batch; the fields of `Layout` name it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from r3patch._errors import RoutesError
from r3patch.rows.routes import Routes, have_tokens


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the samples of a microbatch become the token rows of one rank.

    Args:
        tp_size: tensor-parallel ranks; they share the tokens under ``sequence_parallel`` only.
        tp_rank: this rank's place among them.
        cp_size: context-parallel ranks.
        cp_rank: this rank's place among them.
        sequence_parallel: whether the tokens are cut over the tensor-parallel ranks.
        packed: True: the samples follow each other in one row (thd). False: one sample per row,
            padded to ``seq_length`` (bshd).
        cp_order: ``"zigzag"``: every sample is cut into ``2 * cp_size`` chunks, and rank r has
            chunks r and ``2 * cp_size - 1 - r``. ``"contiguous"``: rank r has the r-th of
            ``cp_size`` chunks, of the whole microbatch when packed and of each row when padded.
        align: tokens; a packed sample is padded to a multiple of it, with zigzag context
            parallelism to a multiple of it and of ``2 * cp_size``.
        pad_to_multiple: tokens; a packed microbatch, over all context-parallel ranks, is padded
            to a multiple of it. Zigzag: every rank has an equal share of that tail at its own
            end. Contiguous: the tail stands at the end of the microbatch, before the cut.
        seq_length: tokens per row of a padded batch, over all ranks.
        padding_side: where a padded row has its padding.

    Raises:
        RoutesError: a field has an impossible value, or is one of the other kind of batch.
    """

    tp_size: int = 1
    tp_rank: int = 0
    cp_size: int = 1
    cp_rank: int = 0
    sequence_parallel: bool = False
    packed: bool = True
    cp_order: Literal["zigzag", "contiguous"] = "zigzag"
    align: int = 1
    pad_to_multiple: int = 1
    seq_length: int | None = None
    padding_side: Literal["right", "left"] = "right"

    def __post_init__(self) -> None:
        for kind in ("tp", "cp"):
            size, rank = getattr(self, f"{kind}_size"), getattr(self, f"{kind}_rank")
            if size < 1 or not 0 <= rank < size:
                raise RoutesError(f"{kind}_rank={rank} does not exist with {kind}_size={size}.")
        if self.cp_order not in ("zigzag", "contiguous"):
            raise RoutesError(f'cp_order is {self.cp_order!r}, expected "zigzag" or "contiguous".')
        if self.padding_side not in ("right", "left"):
            raise RoutesError(f'padding_side is {self.padding_side!r}, expected "right" or "left".')
        if self.packed:
            self._check_packed()
        else:
            self._check_padded()

    def _check_packed(self) -> None:
        if self.seq_length is not None or self.padding_side != "right":
            raise RoutesError("seq_length and padding_side belong to padded batches, packed=False.")
        if self.align < 1 or self.pad_to_multiple < 1:
            raise RoutesError(
                f"align={self.align}, pad_to_multiple={self.pad_to_multiple}: expected 1 or more."
            )

    def _check_padded(self) -> None:
        if self.align != 1 or self.pad_to_multiple != 1:
            raise RoutesError("align and pad_to_multiple belong to packed batches, packed=True.")
        if self.seq_length is None or self.seq_length < 1:
            raise RoutesError(f"seq_length is {self.seq_length}: packed=False needs it.")
        tp_parts = self.tp_size if self.sequence_parallel else 1
        if self.seq_length % self._cp_chunks or self.seq_length // self.cp_size % tp_parts:
            raise RoutesError(
                f"seq_length={self.seq_length} cannot be cut into {self._cp_chunks} chunks for "
                f"context and each rank's part into {tp_parts} for sequence parallelism."
            )

    @classmethod
    def from_megatron(cls, config: Any, **rest: Any) -> Layout:
        """The layout of this rank: sizes from the config, ranks from Megatron's parallel state.

        Args:
            config: a ``TransformerConfig``, or anything with ``tensor_model_parallel_size``,
                ``context_parallel_size`` and ``sequence_parallel``.
            rest: the other fields of `Layout`, and ``tp_rank`` and ``cp_rank`` where the parallel
                state is not initialised, as on a controller.

        Raises:
            RoutesError: a rank is neither given nor known to Megatron.

        Source: megatron/core/model_parallel_config.py, megatron/core/parallel_state.py.
        """
        fields = {
            "tp_size": config.tensor_model_parallel_size,
            "cp_size": config.context_parallel_size,
            "sequence_parallel": config.sequence_parallel,
            **rest,
        }
        for kind, group in (("tp", "tensor_model_parallel"), ("cp", "context_parallel")):
            if fields[f"{kind}_size"] > 1 and f"{kind}_rank" not in rest:
                fields[f"{kind}_rank"] = _megatron_rank(group, f"{kind}_rank")
        return cls(**fields)

    def place(self, samples: Sequence[Routes]) -> Routes:
        """The rows of this rank in the router's order. Rows of padding are invalid.

        Tokens of the samples take the same way as their rows; padding has the token -1.

        Args:
            samples: the samples of one microbatch in its order, one row per token of each.

        Returns:
            As many rows as this rank's routers get tokens.

        Raises:
            RoutesError: no samples; samples that differ in layers, topk or num_experts, or
                of which only some have tokens; one longer than ``seq_length``; tokens that cannot
                be cut evenly.
        """
        like = _check_alike(samples)
        lengths = [sample.num_tokens for sample in samples]
        index = self._index(lengths)
        real = index >= 0
        # Sample by sample into place: joining the samples first would hold all of them twice.
        place = torch.full((sum(lengths),), -1, device="cpu")
        place[index[real]] = real.nonzero().squeeze(1)
        tokens = None
        if have_tokens(samples, "sample"):
            tokens = torch.full((index.numel(),), -1, dtype=torch.int32, device="cpu")
        experts = like.experts.new_zeros(index.numel(), like.num_layers, like.topk)
        valid = torch.zeros(index.numel(), like.num_layers, dtype=torch.bool, device="cpu")
        for sample, rows in zip(samples, torch.split(place, lengths), strict=True):
            here = rows >= 0
            if here.all():
                kept = sample
            else:
                kept, rows = sample[here], rows[here]
            experts.index_copy_(0, rows, kept.experts)
            valid.index_copy_(0, rows, kept.mask)
            if tokens is not None and kept.tokens is not None:
                tokens.index_copy_(0, rows, kept.tokens)
        return Routes._checked(experts, like.layers, valid, like.num_experts, tokens)

    def place_ids(self, ids: Sequence[Tensor], pad: int = -1) -> Tensor:
        """The same arithmetic on token ids, to check that rows and tokens travelled together.

        Args:
            ids: ``[num_tokens]`` integers for each sample.
            pad: what stands at the places of padding.

        Returns:
            ``[rows of this rank]``: the token whose row `place` puts there.

        Raises:
            RoutesError: as for `place`.
        """
        if not ids or any(sample.dim() != 1 for sample in ids):
            raise RoutesError("place_ids takes the 1-dimensional token ids of one sample or more.")
        index = self._index([sample.numel() for sample in ids]).to(ids[0].device)
        tokens = torch.cat([*ids, ids[0].new_tensor([pad])])  # the index -1 finds the pad
        return tokens[index]

    def _index(self, lengths: list[int]) -> Tensor:
        """For every row of this rank its token, counted through the samples; -1 for padding."""
        index = self._packed_index(lengths) if self.packed else self._padded_index(lengths)
        if not self.sequence_parallel:
            return index
        if index.numel() % self.tp_size:
            raise RoutesError(
                f"{index.numel()} tokens cannot be cut over tp_size={self.tp_size} for sequence "
                "parallelism: set pad_to_multiple to a multiple of tp_size * cp_size."
            )
        return index.chunk(self.tp_size)[self.tp_rank]

    def _packed_index(self, lengths: list[int]) -> Tensor:
        zigzag = self.cp_size > 1 and self.cp_order == "zigzag"
        unit = math.lcm(self.align, self._cp_chunks) if zigzag else self.align
        padded = [_pad(tokens, -len(tokens) % unit) for tokens in _tokens(lengths)]
        total = sum(len(tokens) for tokens in padded)
        tail = -total % self.pad_to_multiple
        if (total + tail) % self.cp_size:
            raise RoutesError(
                f"{total + tail} tokens cannot be cut over cp_size={self.cp_size}: set "
                "pad_to_multiple to a multiple of it."
            )
        if zigzag:
            own = [self._cp_part(tokens) for tokens in padded]
            return _pad(torch.cat(own), tail // self.cp_size)
        return self._cp_part(_pad(torch.cat(padded), tail))

    def _padded_index(self, lengths: list[int]) -> Tensor:
        assert self.seq_length is not None
        if max(lengths) > self.seq_length:
            raise RoutesError(
                f"sample {lengths.index(max(lengths))} has {max(lengths)} tokens, more than "
                f"seq_length={self.seq_length}."
            )
        left = self.padding_side == "left"
        rows = [_pad(row, self.seq_length - len(row), left=left) for row in _tokens(lengths)]
        # [seq_length, batch]: the router flattens sequence-major.
        return torch.stack([self._cp_part(row) for row in rows], dim=1).flatten()

    @property
    def _cp_chunks(self) -> int:
        return 2 * self.cp_size if self.cp_size > 1 and self.cp_order == "zigzag" else self.cp_size

    def _cp_part(self, tokens: Tensor) -> Tensor:
        own = [self.cp_rank]
        if self._cp_chunks > self.cp_size:
            own.append(self._cp_chunks - 1 - self.cp_rank)
        return tokens.view(self._cp_chunks, len(tokens) // self._cp_chunks)[own].flatten()


# As for Routes: a controller sends layouts to ranks, and files may move.
Layout.__module__ = "r3patch"


def _tokens(lengths: list[int]) -> list[Tensor]:
    """The tokens of each sample, counted through the samples."""
    return list(torch.split(torch.arange(sum(lengths), device="cpu"), lengths))


def _pad(tokens: Tensor, count: int, *, left: bool = False) -> Tensor:
    return torch.nn.functional.pad(tokens, (count, 0) if left else (0, count), value=-1)


def _check_alike(samples: Sequence[Routes]) -> Routes:
    if not samples:
        raise RoutesError("a microbatch has one sample or more, got none.")
    kinds = sorted({(sample.layers, sample.topk, sample.num_experts) for sample in samples})
    if len(kinds) > 1:
        raise RoutesError(
            f"the samples differ in (layers, topk, num_experts): {kinds[0]} and {kinds[1]}. "
            "Routes.select gives them the same layers."
        )
    return samples[0]


def _megatron_rank(group: str, field: str) -> int:
    # Not imported means not initialised, and pure arithmetic should not import Megatron.
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        raise RoutesError(f"Megatron's parallel state is not initialised: give {field}.")
    rank: int = getattr(state, f"get_{group}_rank")()
    return rank
