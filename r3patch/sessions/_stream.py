"""The data of a session: rows on the host, on their way to or from the routers of one chunk.

Host rows are narrow (``uint8`` or ``int16``) and only of this chunk's layers. They travel once per
microbatch, without blocking; the two latest microbatches stay on the device, older ones are copied
again should a recompute ask for them. Widening to ``int64`` is the tap's, call by call.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from r3patch._errors import ReplayError
from r3patch.metrics import ExpertLoad
from r3patch.rows.routes import Routes
from r3patch.rows.spread import spread_rows

if TYPE_CHECKING:
    from r3patch.labels.model import RouterInfo

_KEPT_ON_DEVICE = 2  # 1F1B alternates between one microbatch's forward and another's recompute


class Mask:
    """Which rows of a microbatch the rollout gave: asked for on the host, used on the device."""

    def __init__(self, valid: torch.Tensor | None) -> None:
        self._valid = None if valid is None or bool(valid.all()) else valid.contiguous()
        self._device: dict[tuple[str, int, int], torch.Tensor] = {}
        self._counts: dict[tuple[int, int], int] = {}

    def given(self, num_tokens: int) -> torch.Tensor:
        """``[num_tokens] bool`` on the host: the rows that the rollout gave."""
        return torch.ones(num_tokens, dtype=torch.bool) if self._valid is None else self._valid

    def num_invalid(self, start: int, stop: int) -> int:
        if self._valid is None:
            return 0
        if (start, stop) not in self._counts:
            self._counts[start, stop] = stop - start - int(self._valid[start:stop].sum())
        return self._counts[start, stop]

    def valid(self, start: int, stop: int, device: torch.device) -> torch.Tensor | None:
        """``[stop - start] bool`` on the device, or None where every row is valid."""
        if not self.num_invalid(start, stop):
            return None
        assert self._valid is not None
        return self._on_device("valid", start, stop, self._valid[start:stop], device)

    def invalid(self, start: int, stop: int, device: torch.device) -> torch.Tensor | None:
        """``[num_invalid] int64`` positions after ``start`` on the device, or None."""
        if not self.num_invalid(start, stop):
            return None
        assert self._valid is not None
        positions = (~self._valid[start:stop]).nonzero().squeeze(1)
        return self._on_device("invalid", start, stop, positions, device)

    def _on_device(
        self, kind: str, start: int, stop: int, host: torch.Tensor, device: torch.device
    ) -> torch.Tensor:
        key = (kind, start, stop)
        if key not in self._device:
            self._device[key] = _to_device(host, device)
        return self._device[key]

    def drop_device(self) -> None:
        self._device.clear()


class Column:
    """One layer of a microbatch: where its rows stand, and which of them the rollout gave."""

    def __init__(self, index: int, mask: Mask, *, spread: bool) -> None:
        self.index = index
        self.mask = mask
        self.spread = spread

    def live_rows(self, start: int, stop: int, device: torch.device) -> torch.Tensor | None:
        """``[num_live] int64``: the rows for which Megatron chooses; None where there are none."""
        return None if self.spread else self.mask.invalid(start, stop, device)


class Microbatch:
    """The rows of one microbatch for the main routers of one chunk.

    Args:
        routes: with a column for each of ``layers``.
        layers: the layer numbers of the chunk's main routers.
        spread: give invalid rows experts of their own, evenly, instead of Megatron's choice.
        ep_size: expert-parallel ranks to spread over.
    """

    def __init__(
        self, routes: Routes, layers: Sequence[int], *, spread: bool = False, ep_size: int = 1
    ) -> None:
        routes = routes.select(layers)
        self.num_tokens = routes.num_tokens
        rows = routes.experts.permute(1, 0, 2).contiguous()  # [num_layers, num_tokens, topk]
        masks = list(_masks(routes.valid, len(layers)))
        if spread:
            for index, mask in enumerate(masks):
                missing = mask.invalid(0, self.num_tokens, rows.device)
                if missing is not None:
                    fill = spread_rows(
                        len(missing),
                        routes.topk,
                        routes.num_experts,
                        first=index * len(missing),
                        ep_size=ep_size,
                    )
                    rows[index, missing] = fill.to(rows.dtype)
        self.rows = rows.pin_memory() if torch.cuda.is_available() else rows
        self.on_device: torch.Tensor | None = None
        every = torch.ones(self.num_tokens, dtype=torch.bool)
        self.num_experts = routes.num_experts
        self._any_valid = every if routes.valid is None else routes.valid.any(dim=1)
        self.differing: torch.Tensor | None = None  # [num_tokens] bool: in at least one layer
        self._columns = {
            layer: Column(index, masks[index], spread=spread) for index, layer in enumerate(layers)
        }

    def column(self, layer_number: int) -> Column:
        return self._columns[layer_number]

    def note_differing(self, differs: torch.Tensor, start: int) -> None:
        """Remember which tokens ``start:start + len(differs)`` a layer routes otherwise."""
        if self.differing is None:
            self.differing = differs.new_zeros(self.num_tokens)
        self.differing[start : start + len(differs)] |= differs

    def token_codes(self) -> torch.Tensor:
        """``[num_tokens] uint8``: 0 nothing measured, 1 as Megatron would, 2 differs in a layer."""
        codes = self._any_valid.to(torch.uint8)
        return codes if self.differing is None else codes + self.differing.cpu()

    def expert_load(self) -> ExpertLoad:
        """The load of the rollout's rows, and of spread ones as padding; live ones have no ids."""
        real, padding, invalid = [], [], []
        for column in self._columns.values():
            rows, given = self.rows[column.index].int(), column.mask.given(self.num_tokens)
            real.append(torch.bincount(rows[given].flatten(), minlength=self.num_experts))
            filled = rows[~given] if column.spread else rows[:0]
            padding.append(torch.bincount(filled.flatten(), minlength=self.num_experts))
            invalid.append((~given).sum())
        return ExpertLoad(
            tuple(self._columns), torch.stack(real), torch.stack(padding), torch.stack(invalid)
        )

    def drop_device(self) -> None:
        self.on_device = None
        for column in self._columns.values():
            column.mask.drop_device()


class ReplayStream:
    """The microbatches that one chunk replays, in the order of its forward calls."""

    def __init__(
        self, routers: Sequence[RouterInfo], *, missing: str, ep_size: int, mlp_chunks: int
    ) -> None:
        self.layers = tuple(sorted({layer_of(info) for info in routers}))
        self.microbatches: list[Microbatch] = []
        self.recomputable = False  # a call since the last model output that backward may repeat
        self.seconds = 0.0
        self._missing = missing
        self._ep_size = ep_size
        self._mlp_chunks = mlp_chunks
        self._recent: list[Microbatch] = []

    def append(self, routes: Routes) -> None:
        """Add a microbatch. The caller has checked it (``manager._check``)."""
        if not self.layers:
            return
        began = time.perf_counter()
        spread = self._missing == "spread"
        self.microbatches.append(
            Microbatch(routes, self.layers, spread=spread, ep_size=self._ep_size)
        )
        self.seconds += time.perf_counter() - began

    def expert_load(self) -> ExpertLoad | None:
        """The load over all microbatches so far; None without any."""
        parts = [m.expert_load() for m in self.microbatches]
        return parts[0].merge(*parts[1:]) if parts else None

    def get(self, index: int, name: str) -> Microbatch:
        if index >= len(self.microbatches):
            raise ReplayError(
                f"{name}: forward call {index + 1} has no rows: {len(self.microbatches)} "
                "microbatches were given. Give one per forward pass of the model, or call "
                "session.feed(routes) before each."
            )
        return self.microbatches[index]

    def on_device(self, microbatch: Microbatch, device: torch.device) -> torch.Tensor:
        """``[num_layers, num_tokens, topk]`` narrow ids of a microbatch, copied at first use."""
        if microbatch.on_device is None:
            began = time.perf_counter()
            microbatch.on_device = _to_device(microbatch.rows, device)
            self._recent = [*self._recent, microbatch]
            while len(self._recent) > _KEPT_ON_DEVICE:
                self._recent.pop(0).drop_device()
            self.seconds += time.perf_counter() - began
        return microbatch.on_device

    def release(self) -> None:
        """Free the device rows: the user may keep the session for its figures."""
        for microbatch in self._recent:
            microbatch.drop_device()
        self._recent = []

    def check_size(self, microbatch: Microbatch, start: int, num_tokens: int, name: str) -> None:
        """Refuse a call for neither a whole microbatch nor the next piece of a chunked MLP."""
        total = microbatch.num_tokens
        if num_tokens == total and start == 0:
            return
        if self._mlp_chunks > 1 and _is_piece(total, start, num_tokens, self._mlp_chunks):
            return
        raise ReplayError(
            f"{name}: the router routes {num_tokens} tokens, the microbatch has {total - start} "
            f"rows{' left' if start else ''}. {_size_hint(num_tokens, total)}"
        )


class RecordStream:
    """The ids that one chunk's main routers chose, copied to the host without blocking."""

    def __init__(self, routers: Sequence[RouterInfo], *, num_experts: int) -> None:
        self.layers = tuple(sorted({layer_of(info) for info in routers}))
        self.seconds = 0.0
        self.forward_pass = 0  # counted by the chunk's hook; pieces of a chunked MLP share one
        self._num_experts = num_experts
        self._pieces: dict[int, list[tuple[int, torch.Tensor]]] = {n: [] for n in self.layers}

    def record(self, layer_number: int, ids: torch.Tensor) -> None:
        """Keep the ids ``[num_tokens, topk]`` of one forward call."""
        narrow = ids.detach().to(torch.uint8 if self._num_experts <= 256 else torch.int16)
        host = torch.empty(narrow.shape, dtype=narrow.dtype, pin_memory=narrow.is_cuda)
        host.copy_(narrow, non_blocking=True)
        self._pieces[layer_number].append((self.forward_pass, host))

    def columns(self, *, chunked: bool) -> dict[int, list[torch.Tensor]]:
        """For each layer the ids ``[num_tokens, topk]`` of each microbatch."""
        if not chunked:
            return {layer: [host for _, host in calls] for layer, calls in self._pieces.items()}
        columns = {}
        for layer, calls in self._pieces.items():
            passes: dict[int, list[torch.Tensor]] = {}
            for forward_pass, host in calls:
                passes.setdefault(forward_pass, []).append(host)
            columns[layer] = [torch.cat(pieces) for pieces in passes.values()]
        return columns


def layer_of(info: RouterInfo) -> int:
    """The layer number of a main router."""
    assert info.layer_number is not None  # verify() has refused main routers without one
    return info.layer_number


def _masks(valid: torch.Tensor | None, num_layers: int) -> Iterator[Mask]:
    """A mask per layer; layers with equal rows share one, as nearly all do."""
    previous: torch.Tensor | None = None
    mask = Mask(None)
    for index in range(num_layers):
        rows = None if valid is None else valid[:, index]
        if rows is not None and (previous is None or not torch.equal(rows, previous)):
            mask, previous = Mask(rows), rows
        yield mask


def _to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return host.to(device)
    if not host.is_pinned():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


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
    if num_tokens < total and total % num_tokens == 0:
        return (
            f"The rows are {total // num_tokens} times too many: with sequence parallelism a rank "
            "routes 1/tp_size of the tokens, with context parallelism 1/cp_size. Place the samples "
            "by Layout(...).place, which knows both, and give each forward pass one microbatch."
        )
    if num_tokens > total and num_tokens % total == 0:
        return (
            f"The tokens are {num_tokens // total} times as many: the rows were cut for sequence "
            "or context parallelism that the model does not use, or are one sample's of a batch."
        )
    return "Place the samples by Layout(...).place with the padding that the batch uses."
