"""Routes: which experts each token of a sequence took, in every MoE layer.

A *row* is one token in one layer: ``topk`` distinct expert ids. The columns along the layer axis
carry Megatron's own layer numbers, so a part of the layers (a pipeline stage) can be sent on its
own and no stage offset is ever computed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from r3patch._errors import RoutesError
from r3patch.rows import files
from r3patch.rows.arrays import as_ids, as_mask, as_tokens, signed
from r3patch.rows.checks import narrow, stored_dtype
from r3patch.rows.plain import check_layers, check_sizes, integer

logger = logging.getLogger(__name__)


class Routes:
    """Expert ids of a sequence of tokens. Treat it as immutable.

    Args:
        experts: ``[num_tokens, num_layers, topk]`` integers, a tensor or anything that
            ``torch.tensor`` takes. Copied; kept on the host as uint8 up to 256 experts and
            as int16 above. The order of the ids within a row carries no meaning. A row of -1
            is invalid.
        layers: the 1-based Megatron layer number of each column, unique.
        valid: ``[num_tokens]`` or ``[num_tokens, num_layers]`` bool, False where no routes are
            known; None means that every row is valid. Ids of invalid rows are ignored and
            stored as zeros.
        num_experts: routed experts per MoE layer.
        tokens: ``[num_tokens]`` token ids that the rows were computed for, -1 for none (padding);
            kept on the host as int32. They travel with the rows, so that rows of other tokens
            can be told; None where nobody knows them.

    Attributes:
        bad_rows: rows that ``decode(..., on_bad_rows="invalid")`` found bad and marked invalid.
            Not carried over by the methods, nor compared by ``==``.

    Raises:
        RoutesError: a shape, dtype, layer number or token is wrong, or a valid row has an id
            outside ``[0, num_experts)`` or the same id twice.
    """

    experts: Tensor
    layers: tuple[int, ...]
    valid: Tensor | None
    num_experts: int
    tokens: Tensor | None
    bad_rows: int

    def __init__(
        self,
        experts: Tensor | Any,
        layers: Iterable[int],
        valid: Tensor | Any | None = None,
        *,
        num_experts: int,
        tokens: Tensor | Any | None = None,
    ) -> None:
        wide = as_ids(experts, "experts")
        if wide.dim() != 3:
            raise RoutesError(
                f"experts has shape {tuple(wide.shape)}, expected [num_tokens, num_layers, topk]."
            )
        layers = check_layers(layers)
        num_tokens, num_layers, topk = wide.shape
        if len(layers) != num_layers:
            raise RoutesError(
                f"experts has {num_layers} layers (shape {tuple(wide.shape)}) but layers names "
                f"{len(layers)}: pass one Megatron layer number per column."
            )
        topk, num_experts = check_sizes(topk, num_experts)
        mask = None if valid is None else _valid(valid, num_tokens, num_layers)
        ids = torch.empty(wide.shape, dtype=stored_dtype(num_experts), device="cpu")
        bad = narrow(wide, ids, num_experts)
        if bad is not None:
            known = ~(signed(wide) == -1).all(-1)
            mask = known if mask is None else mask & known
            bad &= mask
        if mask is not None:
            ids.masked_fill_(~mask.unsqueeze(-1), 0)
        if bad is not None and bad.any():
            _raise_bad_row(wide, layers, bad, num_experts)
        if tokens is not None:
            tokens = as_tokens(tokens, "tokens", num_tokens)
        self._set(ids, layers, mask, num_experts, tokens)

    def _set(
        self,
        experts: Tensor,
        layers: tuple[int, ...],
        valid: Tensor | None,
        num_experts: int,
        tokens: Tensor | None,
    ) -> None:
        # One form for "every row is valid", so that equal routes have equal attributes.
        if valid is not None and bool(valid.all()):
            valid = None
        self.experts, self.layers, self.valid = experts, layers, valid
        self.num_experts, self.tokens, self.bad_rows = num_experts, tokens, 0

    @classmethod
    def _checked(
        cls,
        experts: Tensor,
        layers: tuple[int, ...],
        valid: Tensor | None,
        num_experts: int,
        tokens: Tensor | None = None,
    ) -> Routes:
        """Builds from tensors that hold every invariant already, without copy or check."""
        routes = cls.__new__(cls)
        routes._set(experts, layers, valid, num_experts, tokens)
        return routes

    @classmethod
    def missing(
        cls,
        num_tokens: int,
        layers: Iterable[int],
        topk: int,
        num_experts: int,
        *,
        tokens: Tensor | Any | None = None,
    ) -> Routes:
        """Routes without one valid row, for a sample whose routes the engine did not return."""
        layers = check_layers(layers)
        topk, num_experts = check_sizes(topk, num_experts)
        shape = (integer(num_tokens, "num_tokens", 0), len(layers), topk)
        experts = torch.zeros(shape, dtype=stored_dtype(num_experts), device="cpu")
        valid = torch.zeros(shape[:2], dtype=torch.bool, device="cpu")
        if tokens is not None:
            tokens = as_tokens(tokens, "tokens", shape[0])
        return cls._checked(experts, layers, valid, num_experts, tokens)

    @property
    def num_tokens(self) -> int:
        """Rows: one per token, in the order of the sample or of the router."""
        return self.experts.shape[0]

    @property
    def num_layers(self) -> int:
        """Columns: layers with routes."""
        return self.experts.shape[1]

    @property
    def topk(self) -> int:
        """Experts per token and layer."""
        return self.experts.shape[2]

    @property
    def mask(self) -> Tensor:
        """``[num_tokens, num_layers] bool``: ``valid``, or True everywhere where that is None."""
        if self.valid is not None:
            return self.valid
        return torch.ones(self.experts.shape[:2], dtype=torch.bool, device="cpu")

    @property
    def invalid_rows(self) -> int:
        """How many of the ``num_tokens * num_layers`` rows are invalid."""
        return 0 if self.valid is None else int((~self.valid).sum())

    def select(self, layers: Iterable[int]) -> Routes:
        """The columns of these layers, in this order: the part that a pipeline stage needs.

        Raises:
            RoutesError: a layer has no column, or is named twice.
        """
        layers = check_layers(layers)
        absent = sorted(set(layers) - set(self.layers))
        if absent:
            raise RoutesError(
                f"no routes for layers {absent}: the columns are layers {_span(self.layers)}. "
                "Layers are 1-based Megatron layer numbers of MoE layers."
            )
        if layers == self.layers:
            return self
        columns = _positions(layers, self.layers)
        valid = None if self.valid is None else self.valid.index_select(1, columns)
        experts = self.experts.index_select(1, columns)
        return self._checked(experts, layers, valid, self.num_experts, self.tokens)

    def __getitem__(self, index: slice | Tensor) -> Routes:
        """The rows of some tokens: a slice, a bool mask or int64 positions ``[n]``.

        Always a copy, because pickling a view would send the whole storage along.
        """
        if isinstance(index, slice):
            index = torch.arange(self.num_tokens, device="cpu")[index]
        elif not isinstance(index, Tensor) or index.dtype not in (torch.bool, torch.int64):
            # torch takes a uint8 index for a mask, and an int would drop the token axis.
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise RoutesError(
                f"routes[...] got {got}, expected a slice, a bool mask or an int64 tensor."
            )
        valid = None if self.valid is None else self.valid[index]
        tokens = None if self.tokens is None else self.tokens[index]
        return self._checked(self.experts[index], self.layers, valid, self.num_experts, tokens)

    @classmethod
    def join(
        cls,
        parts: Sequence[Routes],
        *,
        keep: Literal["error", "first", "latest"] = "error",
    ) -> Routes:
        """Routes of one sequence from parts of it: turns, resumed rollouts, pipeline stages.

        Row i of every part belongs to token i of the same sequence; a part may end early. The
        result has the layers of all parts. A row is taken from a part where it is valid.

        Parts with tokens: the last part is the truth and the result has its tokens. An earlier
        part counts up to where it leaves them, as it does where a chat template renders history
        anew. Parts without tokens: the result has as many as the longest part.

        Args:
            parts: in the order in which the engine answered.
            keep: which row counts where several parts have a valid one. ``"first"``: the
                experts that generated the token. ``"latest"``: those of the last prefill, which
                ran on the newest weights. ``"error"``: they must be the same set.

        Raises:
            RoutesError: no parts, different ``topk`` or ``num_experts``, tokens in some parts
                only, a part whose first token is not the last part's, or under ``"error"`` two
                parts that disagree about a row.
        """
        if keep not in ("error", "first", "latest"):
            raise RoutesError(f'keep is {keep!r}, expected "error", "first" or "latest".')
        parts = list(parts)
        if not parts:
            raise RoutesError("Routes.join got no parts; for no routes use Routes.missing.")
        _check_same_kind(parts)
        tokens = parts[-1].tokens if have_tokens(parts, "part") else None
        if tokens is not None:
            parts = [_cut(part, tokens, number) for number, part in enumerate(parts)]
        layers = tuple(dict.fromkeys(layer for part in parts for layer in part.layers))
        num_tokens = max(part.num_tokens for part in parts)
        topk, num_experts = parts[0].topk, parts[0].num_experts
        shape = (num_tokens, len(layers), topk)
        experts = torch.zeros(shape, dtype=stored_dtype(num_experts), device="cpu")
        valid = torch.zeros(shape[:2], dtype=torch.bool, device="cpu")
        for number, part in enumerate(parts):
            rows = slice(0, part.num_tokens)
            columns = _positions(part.layers, layers)
            known = valid[rows].index_select(1, columns)
            ids = experts[rows].index_select(1, columns)
            take = part.mask
            if keep == "error":
                _check_agreement(ids, part, known & take, number)
            if keep != "latest":
                take = take & ~known
            ids = torch.where(take.unsqueeze(-1), part.experts, ids)
            experts[rows].index_copy_(1, columns, ids)
            valid[rows].index_copy_(1, columns, known | take)
        return cls._checked(experts, layers, valid, num_experts, tokens)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the routes to a safetensors file that ``Routes.load`` and other tools read.

        Raises:
            RoutesError: safetensors or numpy is missing, which the extra ``rollout`` installs.
            OSError: the file cannot be written.
        """
        files.write(
            path,
            files.Contents(self.layers, self.num_experts, self.experts, self.valid, self.tokens),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Routes:
        """Reads a file of ``Routes.save``. Runs no code from it, and checks what it holds.

        Raises:
            RoutesError: the file is something else, damaged, or of another version.
            OSError: the file cannot be read.
        """
        held = files.read(path)
        try:
            return cls(
                held.experts,
                held.layers,
                held.valid,
                num_experts=held.num_experts,
                tokens=held.tokens,
            )
        except RoutesError as error:
            raise RoutesError(f"{os.fspath(path)} is damaged: {error}") from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Routes):
            return NotImplemented
        return (
            (self.layers, self.num_experts) == (other.layers, other.num_experts)
            and torch.equal(self.experts, other.experts)
            and torch.equal(self.mask, other.mask)
            and _equal_tokens(self.tokens, other.tokens)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"Routes(num_tokens={self.num_tokens}, layers={_span(self.layers)}, topk={self.topk}, "
            f"num_experts={self.num_experts}, invalid_rows={self.invalid_rows}"
            f"{'' if self.tokens is None else ', with tokens'})"
        )


# Pickles and tracebacks say ``r3patch.Routes``, wherever the class lives in the package.
Routes.__module__ = "r3patch"


def _valid(valid: Any, num_tokens: int, num_layers: int) -> Tensor:
    mask = as_mask(valid, "valid")
    if mask.shape == (num_tokens,):
        mask = mask.unsqueeze(1).expand(num_tokens, num_layers)
    if mask.shape != (num_tokens, num_layers):
        raise RoutesError(
            f"valid has shape {tuple(mask.shape)}, expected [{num_tokens}] or "
            f"[{num_tokens}, {num_layers}] to go with experts."
        )
    return mask.to(torch.bool, copy=True, memory_format=torch.contiguous_format)


def _raise_bad_row(wide: Tensor, layers: tuple[int, ...], bad: Tensor, num_experts: int) -> None:
    token, column = bad.nonzero()[0].tolist()
    ids = signed(wide[token, column]).tolist()
    raise RoutesError(
        f"token {token}, layer {layers[column]}: experts {ids}, expected {len(ids)} distinct ids "
        f"in [0, {num_experts}). {int(bad.sum())} of {bad.numel()} rows are like this; mark rows "
        "without routes in valid."
    )


def _positions(layers: tuple[int, ...], within: tuple[int, ...]) -> Tensor:
    column = {layer: index for index, layer in enumerate(within)}
    return torch.tensor([column[layer] for layer in layers], dtype=torch.int64, device="cpu")


def have_tokens(parts: Sequence[Routes], noun: str) -> bool:
    """Whether all the parts have tokens; RoutesError where some have and others have not."""
    without = [number for number, part in enumerate(parts) if part.tokens is None]
    if without and len(without) < len(parts):
        raise RoutesError(
            f"{noun} {without[0]} has no tokens and others have: give tokens= to all of them, "
            "Routes.missing too, or to none."
        )
    return not without


def _cut(part: Routes, truth: Tensor, number: int) -> Routes:
    """The part up to where its tokens leave the truth."""
    assert part.tokens is not None
    length = min(part.num_tokens, truth.numel())
    differs = (part.tokens[:length] != truth[:length]).nonzero()
    shared = int(differs[0]) if differs.numel() else length
    if shared == part.num_tokens:
        return part
    if not shared:
        raise RoutesError(
            f"part {number} shares no token with the last part: it begins with "
            f"{part.tokens[:4].tolist()}, the last one with {truth[:4].tolist()}. Parts begin at "
            "the first token of one and the same sequence."
        )
    logger.info(
        "Routes.join: part %d leaves the last part's tokens at token %d; its %d rows from there "
        "on are dropped.", number, shared, part.num_tokens - shared,
    )  # fmt: skip
    return part[:shared]


def _equal_tokens(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _check_same_kind(parts: list[Routes]) -> None:
    kinds = {(part.topk, part.num_experts) for part in parts}
    if len(kinds) > 1:
        raise RoutesError(f"the parts differ in (topk, num_experts): {sorted(kinds)}.")


def _check_agreement(ids: Tensor, part: Routes, both: Tensor, number: int) -> None:
    differ = both & (ids != part.experts).any(-1)
    if not differ.any():
        return
    # Engines order the ids of a row as they like: only another set is another route.
    differ &= (ids.sort(-1).values != part.experts.sort(-1).values).any(-1)
    if differ.any():
        token, column = differ.nonzero()[0].tolist()
        raise RoutesError(
            f"part {number} disagrees with an earlier part on {int(differ.sum())} rows, first on "
            f"token {token}, layer {part.layers[column]}: {part.experts[token, column].tolist()} "
            f'after {ids[token, column].tolist()}. Say which counts: keep="first" or keep="latest".'
        )


def _span(layers: tuple[int, ...]) -> str:
    """Layer numbers for a message: ``(4..61)`` where they follow each other."""
    if len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"({layers[0]}..{layers[-1]})"
    return str(layers)
