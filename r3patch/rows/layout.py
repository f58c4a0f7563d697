"""Layout: from the rows of samples to the rows of this rank's microbatch, in the router's order.

Pure arithmetic on sizes and ranks: a controller computes any rank's part without a process group.
Megatron's router flattens ``[s, b, hidden]`` to ``[s * b, hidden]``, sequence-major
(``TopKRouter.routing`` in megatron/core/transformer/moe/router.py, all versions). Which tokens
stand along ``s`` is the choice of whoever makes the batch; the fields of `Layout` name it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
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
        pack_length: tokens of every packed microbatch in place of pad_to_multiple, for stages of
            one shape.
        tail_in_last_sample: under zigzag the tail of a packed microbatch pads its last sample,
            before that is cut, rather than every rank's end.
        seq_length: tokens per row of a padded batch, over all ranks.
        padding_side: where a padded row has its padding.
        prompt_width: tokens; a padded row has its prompt padded on the left up to here, and then
            its response padded on the right. Placing then takes the samples' prompt lengths.

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
    pack_length: int | None = None
    tail_in_last_sample: bool = False
    seq_length: int | None = None
    padding_side: Literal["right", "left"] = "right"
    prompt_width: int | None = None

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
        if (self.seq_length, self.padding_side, self.prompt_width) != (None, "right", None):
            raise RoutesError(
                "seq_length, padding_side and prompt_width belong to padded batches, packed=False."
            )
        if self.pack_length is not None and (self.pack_length < 1 or self.pad_to_multiple != 1):
            raise RoutesError(
                f"pack_length={self.pack_length}, pad_to_multiple={self.pad_to_multiple}: expected "
                "1 or more, and one of the two."
            )
        if self.align < 1 or self.pad_to_multiple < 1:
            raise RoutesError(
                f"align={self.align}, pad_to_multiple={self.pad_to_multiple}: expected 1 or more."
            )

    def _check_padded(self) -> None:
        pack = (self.align, self.pad_to_multiple, self.pack_length, self.tail_in_last_sample)
        if pack != (1, 1, None, False):
            raise RoutesError(
                "align, pad_to_multiple, pack_length and tail_in_last_sample belong to packed "
                "batches, packed=True."
            )
        if self.seq_length is None or self.seq_length < 1:
            raise RoutesError(f"seq_length is {self.seq_length}: packed=False needs it.")
        if self.prompt_width is not None and (
            not 0 <= self.prompt_width <= self.seq_length or self.padding_side != "right"
        ):
            raise RoutesError(
                f"prompt_width={self.prompt_width}: expected 0 to seq_length={self.seq_length}, "
                "without padding_side."
            )
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

    def place(self, samples: Sequence[Routes], prompts: Sequence[int] | None = None) -> Routes:
        """The rows of this rank in the router's order. Rows of padding are invalid.

        Tokens of the samples take the same way as their rows; padding has the token -1.

        Args:
            samples: the samples of one microbatch in its order, one row per token of each.
            prompts: prompt tokens of each sample, where the layout has a ``prompt_width``.

        Returns:
            As many rows as this rank's routers get tokens.

        Raises:
            RoutesError: no samples; samples that differ in layers, topk or num_experts, or
                of which only some have tokens; one longer than ``seq_length``; tokens that cannot
                be cut evenly.
        """
        like = _check_alike(samples)
        lengths = [sample.num_tokens for sample in samples]
        index = self._index(lengths, prompts)
        real = index >= 0
        # Sample by sample into place: joining the samples first would hold all of them twice.
        place = torch.full((sum(lengths),), -1, device="cpu")
        place[index[real]] = real.nonzero().squeeze(1)
        placed = _Rows(like, index.numel(), tokens=have_tokens(samples, "sample"))
        for sample, rows in zip(samples, torch.split(place, lengths), strict=True):
            here = rows >= 0
            if here.all():
                placed.put(rows, sample)
            else:
                placed.put(rows[here], sample[here])
        return placed.routes()

    def unplace(
        self,
        parts: Routes | Sequence[Routes],
        lengths: Sequence[int],
        prompts: Sequence[int] | None = None,
    ) -> list[Routes]:
        """The rows of each sample again: the inverse of `place`, for routes that were recorded.

        Args:
            parts: this rank's rows of one microbatch; or those of all ranks that share it, by
                context-parallel rank and within that, under sequence parallelism, by
                tensor-parallel rank.
            lengths: tokens of each sample of the microbatch, in its order.
            prompts: as for `place`.

        Returns:
            One `Routes` for each sample. Rows that no part has are invalid, their tokens -1;
            padding is dropped.

        Raises:
            RoutesError: a part has another number of rows than this layout gives its rank; another
                number of parts than ranks; parts of different kinds.
        """
        layouts = [self] if isinstance(parts, Routes) else list(self._ranks())
        parts = [parts] if isinstance(parts, Routes) else list(parts)
        like = _check_alike(parts)
        if len(parts) != len(layouts):
            raise RoutesError(f"got {len(parts)} parts, expected one for each of {len(layouts)}.")
        whole = _Rows(like, sum(lengths), tokens=have_tokens(parts, "part"))
        for number, (layout, part) in enumerate(zip(layouts, parts, strict=True)):
            index = layout._index(list(lengths), prompts)
            if index.numel() != part.num_tokens:
                raise RoutesError(
                    f"part {number} has {part.num_tokens} rows, this layout gives its rank "
                    f"{index.numel()} of samples of {list(lengths)} tokens."
                )
            real = index >= 0
            whole.put(index[real], part if real.all() else part[real])
        routes = whole.routes()
        bounds = torch.tensor([0, *lengths], device="cpu").cumsum(0).tolist()
        return [routes[begin:end] for begin, end in itertools.pairwise(bounds)]

    def place_ids(
        self, ids: Sequence[Tensor], pad: int = -1, prompts: Sequence[int] | None = None
    ) -> Tensor:
        """The same arithmetic on token ids, to check that rows and tokens travelled together.

        Args:
            ids: ``[num_tokens]`` integers for each sample.
            pad: what stands at the places of padding.
            prompts: as for `place`.

        Returns:
            ``[rows of this rank]``: the token whose row `place` puts there.

        Raises:
            RoutesError: as for `place`.
        """
        if not ids or any(sample.dim() != 1 for sample in ids):
            raise RoutesError("place_ids takes the 1-dimensional token ids of one sample or more.")
        return self.place_values(ids, pad, prompts)

    def place_values(
        self, values: Sequence[Tensor], pad: float = 0, prompts: Sequence[int] | None = None
    ) -> Tensor:
        """The same arithmetic on one value per token: log-probs, loss masks, advantages.

        Args:
            values: ``[num_tokens, ...]`` for each sample, of one dtype, device and trailing shape.
            pad: what stands at the places of padding.
            prompts: as for `place`.

        Returns:
            ``[rows of this rank, ...]`` on the device of the values.

        Raises:
            RoutesError: as for `place`; the values have no common dtype, device or trailing shape.
        """
        kinds = {(value.dtype, value.device, value.shape[1:]) for value in values if value.dim()}
        if len(kinds) != 1 or any(not value.dim() for value in values):
            raise RoutesError(
                "values are one [num_tokens, ...] tensor for each sample, of one dtype, device "
                f"and trailing shape; got {sorted(map(str, kinds))}."
            )
        index = self._index([len(value) for value in values], prompts).to(values[0].device)
        padding = values[0].new_full((1, *values[0].shape[1:]), pad)
        return torch.cat([*values, padding])[index]  # the index -1 finds the padding

    def _index(self, lengths: list[int], prompts: Sequence[int] | None) -> Tensor:
        """For every row of this rank its token, counted through the samples; -1 for padding."""
        if (prompts is None) != (self.prompt_width is None):
            raise RoutesError(
                f"prompt_width={self.prompt_width} and prompts={prompts}: one needs the other."
            )
        index = self._packed_index(lengths) if self.packed else self._padded_index(lengths, prompts)
        if not self.sequence_parallel:
            return index
        if index.numel() % self.tp_size:
            raise RoutesError(
                f"{index.numel()} tokens cannot be cut over tp_size={self.tp_size} for sequence "
                "parallelism: set pad_to_multiple to a multiple of tp_size * cp_size."
            )
        return index.chunk(self.tp_size)[self.tp_rank]

    def _packed_index(self, lengths: list[int]) -> Tensor:
        zigzag = self.cp_order == "zigzag"  # of one rank: no cut, as contiguous
        unit = math.lcm(self.align, self._cp_chunks) if zigzag else self.align
        padded = [_pad(tokens, -len(tokens) % unit) for tokens in _tokens(lengths)]
        tail = self._tail(sum(len(tokens) for tokens in padded))
        if not zigzag:
            return self._cp_part(_pad(torch.cat(padded), tail))
        if self.tail_in_last_sample:
            padded[-1], tail = _pad(padded[-1], tail), 0
            if len(padded[-1]) % self._cp_chunks:
                raise RoutesError(
                    f"the last sample has {len(padded[-1])} tokens with the tail, which cannot be "
                    f"cut into {self._cp_chunks} chunks: pad the pack to a multiple of that."
                )
        return _pad(torch.cat([self._cp_part(tokens) for tokens in padded]), tail // self.cp_size)

    def _tail(self, total: int) -> int:
        """Tokens of padding after so many of a pack."""
        tail = -total % self.pad_to_multiple
        if self.pack_length is not None:
            tail = self.pack_length - total
            if tail < 0:
                raise RoutesError(
                    f"the samples have {total} tokens, more than pack_length={self.pack_length}."
                )
        if (total + tail) % self.cp_size:
            raise RoutesError(
                f"{total + tail} tokens cannot be cut over cp_size={self.cp_size}: set "
                "pad_to_multiple to a multiple of it."
            )
        return tail

    def _padded_index(self, lengths: list[int], prompts: Sequence[int] | None) -> Tensor:
        assert self.seq_length is not None
        if max(lengths) > self.seq_length:
            raise RoutesError(
                f"sample {lengths.index(max(lengths))} has {max(lengths)} tokens, more than "
                f"seq_length={self.seq_length}."
            )
        if prompts is not None:
            rows = self._prompts_and_responses(lengths, prompts)
        else:
            left = self.padding_side == "left"
            rows = [_pad(row, self.seq_length - len(row), left=left) for row in _tokens(lengths)]
        # [seq_length, batch]: the router flattens sequence-major.
        return torch.stack([self._cp_part(row) for row in rows], dim=1).flatten()

    def _prompts_and_responses(self, lengths: list[int], prompts: Sequence[int]) -> list[Tensor]:
        assert self.seq_length is not None
        assert self.prompt_width is not None
        if len(prompts) != len(lengths):
            raise RoutesError(f"{len(prompts)} prompt lengths for {len(lengths)} samples.")
        rows = []
        for number, (tokens, prompt) in enumerate(zip(_tokens(lengths), prompts, strict=True)):
            before = self.prompt_width - prompt
            after = self.seq_length - self.prompt_width - (len(tokens) - prompt)
            if before < 0 or after < 0 or not 0 <= prompt <= len(tokens):
                raise RoutesError(
                    f"sample {number} has {prompt} prompt tokens of {len(tokens)}: they do not fit "
                    f"prompt_width={self.prompt_width} of seq_length={self.seq_length}."
                )
            rows.append(_pad(_pad(tokens, before, left=True), after))
        return rows

    def _ranks(self) -> Iterator[Layout]:
        """The layouts of all ranks that share a microbatch's tokens."""
        for cp_rank in range(self.cp_size):
            for tp_rank in range(self.tp_size) if self.sequence_parallel else [self.tp_rank]:
                yield dataclasses.replace(self, cp_rank=cp_rank, tp_rank=tp_rank)

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


class _Rows:
    """Rows of one kind, none of them valid yet, to put those of samples or ranks into."""

    def __init__(self, like: Routes, num_tokens: int, *, tokens: bool) -> None:
        self.like = like
        self.experts = like.experts.new_zeros(num_tokens, like.num_layers, like.topk)
        self.valid = torch.zeros(num_tokens, like.num_layers, dtype=torch.bool, device="cpu")
        self.tokens = torch.full((num_tokens,), -1, dtype=torch.int32, device="cpu")
        self.has_tokens = tokens

    def put(self, places: Tensor, rows: Routes) -> None:
        self.experts.index_copy_(0, places, rows.experts)
        self.valid.index_copy_(0, places, rows.mask)
        if rows.tokens is not None:
            self.tokens.index_copy_(0, places, rows.tokens)

    def routes(self) -> Routes:
        tokens = self.tokens if self.has_tokens else None
        return Routes._checked(
            self.experts, self.like.layers, self.valid, self.like.num_experts, tokens
        )


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
