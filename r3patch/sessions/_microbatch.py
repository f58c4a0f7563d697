"""The rows of one microbatch for the routers of one chunk, on the host and on the device.

Host rows are narrow (``uint8`` or ``int16``), only of this chunk's layers, and the session's own: a
caller may write into the ``Routes`` it gave. They travel in one buffer, by one copy that does not
block, together with the positions of the rows without routes. Widening to ``int64`` is the tap's,
call by call.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from r3patch._errors import ReplayError
from r3patch.labels.model import MainRouter
from r3patch.metrics import ExpertLoad, expert_load
from r3patch.rows.fit import Missing
from r3patch.rows.routes import Routes
from r3patch.rows.spread import spread_missing

__all__ = ["DeviceRows", "Microbatch", "check_size"]

_ALIGN = 8  # bytes: where a section of the buffer may begin, for any dtype to view it


class _Copy(NamedTuple):
    """A copy to a GPU that one of its streams runs, later than the host."""

    buffer: torch.Tensor
    stream: torch.cuda.Stream
    done: torch.cuda.Event

    @classmethod
    def to(cls, buffer: torch.Tensor) -> _Copy:
        """What the current stream was told last is the copy into this buffer."""
        stream = torch.cuda.current_stream(buffer.device)
        return cls(buffer, stream, stream.record_event())

    def wait(self) -> None:
        """Let the current stream wait, if it is another: it would read what is not there yet."""
        stream = torch.cuda.current_stream(self.buffer.device)
        if stream != self.stream:
            stream.wait_event(self.done)
            self.buffer.record_stream(stream)  # or it is freed while that stream still reads it


class DeviceRows(NamedTuple):
    """What the routers of a chunk take, on their device; an entry per layer."""

    ids: tuple[torch.Tensor, ...]
    """``[num_tokens, topk]``, narrow."""
    gaps: tuple[torch.Tensor | None, ...]
    """``[num_gaps] int64``: the rows without routes; None where there are none."""
    probes: tuple[torch.Tensor | None, ...]
    """``[n] int64``: a few rows with routes, for the alarm; None where it does not look."""
    tokens: torch.Tensor | None
    """``[num_tokens] int32``: what the rows were computed for, -1 without a route in any layer."""
    copy: _Copy | None
    """None on a CPU, where nothing runs later than the host."""

    def on_this_stream(self) -> DeviceRows:
        """These rows, for the stream that is current to read."""
        if self.copy is not None:
            self.copy.wait()
        return self


class Microbatch:
    """The rows of one microbatch for the main routers of one chunk.

    Args:
        routes: a column for each of ``routers``, in their order.
        routers: the main routers of the chunk.
        missing: ``"spread"`` gives rows without routes experts of their own; otherwise they are
            gaps, in which Megatron chooses.
        ep_size: expert-parallel ranks to spread over.
        probes: how many rows of each layer the alarm looks at.
    """

    def __init__(
        self,
        routes: Routes,
        routers: Sequence[MainRouter],
        *,
        missing: Missing = "live",
        ep_size: int = 1,
        probes: int = 0,
    ) -> None:
        self.num_tokens = routes.num_tokens
        self.spread = missing == "spread"
        rows = routes.experts.permute(1, 0, 2)
        gaps = list(_gaps(routes.valid, len(routers)))
        if self.spread:
            rows = rows.clone()  # never into the caller's
            experts = [router.num_experts for router in routers]
            spread_missing(rows, gaps, experts, ep_size=ep_size)
        parts: dict[object, torch.Tensor] = {"rows": rows}
        self._gap_keys = [id(positions) for positions in gaps]
        self.num_probes = 0  # rows of all layers that the alarm looks at
        for key, positions in {id(g): g for g in gaps}.items():  # each different one travels once
            if positions is not None:
                parts["gaps", key] = positions
            if probes:
                chosen = parts["probes", key] = _probes(self.num_tokens, positions, probes)
                self.num_probes += len(chosen) * self._gap_keys.count(key)
        self.checked_tokens = 0  # those with a route in some layer
        if routes.tokens is not None:
            has_routes = routes.mask.any(dim=1)
            self.checked_tokens = int(has_routes.sum())
            parts["tokens"] = routes.tokens.masked_fill(~has_routes, -1)
        self._buffer, views = _pack(list(parts.values()))
        self._parts = dict(zip(parts, views, strict=True))
        self.on_device: DeviceRows | None = None

    def to_device(self, device: torch.device) -> DeviceRows:
        """Copy the rows without blocking, or give those that are there already."""
        if self.on_device is None:
            buffer = self._buffer.to(device, non_blocking=True)
            copy = _Copy.to(buffer) if buffer.is_cuda else None
            there = {name: _moved(view, buffer) for name, view in self._parts.items()}
            gaps = [there.get(("gaps", key)) for key in self._gap_keys]
            probes = [there.get(("probes", key)) for key in self._gap_keys]
            self.on_device = DeviceRows(
                there["rows"].unbind(0), tuple(gaps), tuple(probes), there.get("tokens"), copy
            )
        return self.on_device

    def gaps_between(self, column: int, start: int, stop: int) -> tuple[int, int]:
        """Which of a layer's rows without routes lie in ``start:stop`` (asked on the host)."""
        positions = self._parts.get(("gaps", self._gap_keys[column]))
        if positions is None:
            return 0, 0
        return _between(positions, start, stop, self.num_tokens)

    def probes_between(self, column: int, start: int, stop: int) -> tuple[int, int]:
        """Which of the rows of a layer that the alarm looks at lie in ``start:stop``."""
        positions = self._parts["probes", self._gap_keys[column]]
        return _between(positions, start, stop, self.num_tokens)

    def expert_load(self, routes: Routes) -> ExpertLoad:
        """The load of the rollout's rows, and of spread ones as padding; gaps have no ids.

        Args:
            routes: those that this microbatch was made from.
        """
        load = expert_load(routes)
        if not self.spread or routes.valid is None:
            return load
        rows, invalid = self._parts["rows"].permute(1, 0, 2), ~routes.valid
        filled = Routes(rows, routes.layers, invalid, num_experts=routes.num_experts)
        return ExpertLoad(load.layers, load.real, expert_load(filled).real, load.invalid)


def _gaps(valid: torch.Tensor | None, num_layers: int) -> Iterator[torch.Tensor | None]:
    """The rows without routes of each layer; layers with the same ones share a tensor."""
    previous: torch.Tensor | None = None
    gaps: torch.Tensor | None = None
    for index in range(num_layers):
        rows = None if valid is None else valid[:, index]
        if rows is not None and (previous is None or not torch.equal(rows, previous)):
            positions = (~rows).nonzero().squeeze(1)
            gaps, previous = (positions if len(positions) else None), rows
        yield gaps


def _between(positions: torch.Tensor, start: int, stop: int, total: int) -> tuple[int, int]:
    """Which of ascending positions below ``total`` lie in ``start:stop``, as a slice."""
    if stop - start == total:
        return 0, len(positions)
    first, last = torch.searchsorted(positions, positions.new_tensor([start, stop])).tolist()
    return first, last


def _probes(num_tokens: int, gaps: torch.Tensor | None, count: int) -> torch.Tensor:
    """Up to ``count`` rows with routes, evenly spread; none where there is one only."""
    rows = torch.arange(num_tokens, device="cpu")
    if gaps is not None:
        rows = rows[torch.ones_like(rows, dtype=torch.bool).index_fill(0, gaps, False)]
    if len(rows) > count:
        rows = rows[torch.linspace(0, len(rows) - 1, count, device="cpu").long()]
    return rows if len(rows) > 1 else rows[:0]


def _pack(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A buffer that holds copies of all parts, pinned where CUDA is there, and views of them."""
    sizes = [part.numel() * part.element_size() for part in parts]
    starts = [0, *itertools.accumulate(-(-size // _ALIGN) * _ALIGN for size in sizes)]
    pinned = torch.cuda.is_available()
    buffer = torch.empty(starts[-1], dtype=torch.uint8, device="cpu", pin_memory=pinned)
    views = []
    for part, start, size in zip(parts, starts, sizes, strict=False):
        view = buffer[start : start + size].view(part.dtype).view(part.shape)
        views.append(view.copy_(part))
    return buffer, views


def _moved(view: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """The same part of another copy of the buffer."""
    start = view.storage_offset() * view.element_size()
    size = view.numel() * view.element_size()
    return buffer[start : start + size].view(view.dtype).view(view.shape)


def check_size(total: int, start: int, num_tokens: int, mlp_chunks: int, name: str) -> None:
    """Refuse a call for neither a whole microbatch nor the next piece of a chunked MLP.

    Args:
        total: rows of the microbatch.
        start: rows of it that the router has taken.
        num_tokens: tokens of the call.
        mlp_chunks: into how many pieces a layer may cut a microbatch.
        name: the router.

    Raises:
        ReplayError: any other size.
    """
    if num_tokens == total and start == 0:
        return
    if mlp_chunks > 1 and _is_piece(total, start, num_tokens, mlp_chunks):
        return
    raise ReplayError(
        f"{name}: the router routes {num_tokens} tokens, the microbatch has {total - start} "
        f"rows{' left' if start else ''}. {_size_hint(num_tokens, total)}"
    )


def _is_piece(total: int, start: int, num_tokens: int, mlp_chunks: int) -> bool:
    """Whether rows ``start: start + num_tokens`` of ``total`` are a piece for a chunked MLP."""
    return any(
        start % size == 0 and num_tokens == min(size, total - start)
        for size in _piece_sizes(total, mlp_chunks)
    )


@functools.lru_cache(maxsize=64)
def _piece_sizes(total: int, mlp_chunks: int) -> frozenset[int]:
    """The sizes that ``torch.chunk`` along s of ``[s, b]`` tokens can give.

    The batch size b is not known here: any divisor of ``total`` may be it.
    Source: ``TransformerLayer._forward_mlp``, megatron/core/transformer/transformer_layer.py,
    0.18 and newer.
    """
    batches = (batch for batch in range(1, total + 1) if total % batch == 0)
    return frozenset(-(-(total // batch) // mlp_chunks) * batch for batch in batches)


def _size_hint(num_tokens: int, total: int) -> str:
    if 0 < num_tokens < total and total % num_tokens == 0:
        return (
            f"The rows are {total // num_tokens} times too many: with sequence parallelism a rank "
            "routes 1/tp_size of the tokens, with context parallelism 1/cp_size. Place the samples "
            "by Layout(...).place, which knows both, and give each forward pass one microbatch."
        )
    if 0 < total < num_tokens and num_tokens % total == 0:
        return (
            f"The tokens are {num_tokens // total} times as many: the rows were cut for sequence "
            "or context parallelism that the model does not use, or are one sample's of a batch."
        )
    return "Place the samples by Layout(...).place with the padding that the batch uses."
