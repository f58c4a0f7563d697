"""What ``inspect`` looks at: routes as numpy arrays, from a file or a payload. Needs no torch.

The arithmetic is that of `r3patch.metrics`, which works on tensors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from r3patch._errors import RoutesError
from r3patch.rows import files
from r3patch.rows.plain import check_layers, check_sizes

if TYPE_CHECKING:
    from r3patch.rows.routes import Routes

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Selection:
    """Which experts each token took in each layer."""

    experts: Array  # [num_tokens, num_layers, topk], any integers
    layers: tuple[int, ...]
    valid: Array  # [num_tokens, num_layers] bool
    num_experts: int
    tokens: Array | None = None  # [num_tokens], -1: none
    bad_rows: int = 0  # of a payload, marked invalid

    @classmethod
    def of(cls, routes: Routes) -> Selection:
        """The same routes, sharing their memory."""
        return cls(
            routes.experts.numpy(),
            routes.layers,
            routes.mask.numpy(),
            routes.num_experts,
            None if routes.tokens is None else routes.tokens.numpy(),
            routes.bad_rows,
        )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Selection:
        """What ``Routes.save`` wrote, checked as ``Routes.load`` does.

        Raises:
            RoutesError: the file is something else, damaged, or holds what no router chooses.
            OSError: it cannot be read.
        """
        held = files.read(path)
        if not isinstance(held.experts, np.ndarray):  # of version 1, which torch has read
            from r3patch.rows.routes import Routes

            return cls.of(Routes.load(path))
        try:
            return _checked(held)
        except RoutesError as error:
            raise RoutesError(f"{os.fspath(path)} is damaged: {error}") from error

    @property
    def num_tokens(self) -> int:
        return int(self.experts.shape[0])

    @property
    def topk(self) -> int:
        return int(self.experts.shape[2])

    def select(self, layers: Sequence[int]) -> Selection:
        """These layers, in this order."""
        columns = [self.layers.index(layer) for layer in layers]
        return replace(
            self,
            experts=self.experts[:, columns],
            layers=tuple(layers),
            valid=self.valid[:, columns],
        )

    def rows(self, part: slice) -> Selection:
        """Some tokens."""
        tokens = None if self.tokens is None else self.tokens[part]
        return replace(self, experts=self.experts[part], valid=self.valid[part], tokens=tokens)

    def load(self) -> Array:
        """``[num_layers, num_experts] int64``: the valid rows of each expert."""
        counts = [
            np.bincount(self.experts[kept, column].ravel(), minlength=self.num_experts)
            for column, kept in enumerate(self.valid.T)
        ]
        return np.array(counts, np.int64).reshape(len(self.layers), self.num_experts)


@dataclass(frozen=True)
class Difference:
    """In how far two selections differ, over the rows that are valid in both."""

    rows: list[int]  # of each layer
    differing: list[int]
    overlaps: list[float]  # of each layer, the mean fraction of a row's experts in both
    tokens: int
    tokens_differing: int
    overlap: float


def compare(a: Selection, b: Selection) -> Difference:
    """Compare two selections of the same layers and tokens, row by row as sets.

    Raises:
        RoutesError: ``topk`` or ``num_experts`` differ.
    """
    for name in ("topk", "num_experts"):
        left, right = getattr(a, name), getattr(b, name)
        if left != right:
            raise RoutesError(f"{name} is {left} in one and {right} in the other; they must agree.")
    valid = a.valid & b.valid
    common = np.zeros(valid.shape, np.int64)
    for turn in range(a.topk):  # rotations: no [num_tokens, num_layers, topk, topk] in memory
        common += (a.experts == np.roll(b.experts, turn, -1)).sum(-1)
    differs = (common < a.topk) & valid
    rows, shared = valid.sum(0), (common * valid).sum(0)
    return Difference(
        rows.tolist(),
        differs.sum(0).tolist(),
        [part / (n * a.topk) if n else math.nan for part, n in zip(shared, rows, strict=True)],
        int(valid.any(1).sum()),
        int(differs.any(1).sum()),
        float(shared.sum() / (rows.sum() * a.topk)) if rows.sum() else math.nan,
    )


def _checked(held: files.Contents) -> Selection:
    """As ``Routes.__init__``: integers of three axes, and rows of distinct ids in range."""
    experts = held.experts
    if experts.dtype.kind not in "iu" or experts.ndim != 3:
        raise RoutesError(
            f"experts is {experts.dtype} {experts.shape}, expected integers "
            "[num_tokens, num_layers, topk]."
        )
    layers = check_layers(held.layers)
    topk, num_experts = check_sizes(experts.shape[2], held.num_experts)
    if len(layers) != experts.shape[1]:
        raise RoutesError(f"experts has {experts.shape[1]} layers, layers names {len(layers)}.")
    mask = np.ones(experts.shape[:2], bool) if held.valid is None else held.valid
    if mask.dtype != bool or mask.shape not in (experts.shape[:1], experts.shape[:2]):
        raise RoutesError(f"valid is {mask.dtype} {mask.shape}, expected bool, one for each row.")
    mask = np.broadcast_to(mask.reshape(*mask.shape, *[1] * (2 - mask.ndim)), experts.shape[:2])
    tokens = held.tokens
    if tokens is not None and (tokens.dtype.kind not in "iu" or tokens.shape != experts.shape[:1]):
        raise RoutesError(f"tokens is {tokens.dtype} {tokens.shape}, expected a token id per row.")
    ascending = np.sort(experts.astype(np.int64), -1)
    mask = mask & ~(ascending == -1).all(-1)
    bad = (ascending[..., 0] < 0) | (ascending[..., -1] >= num_experts)
    if topk > 1:
        bad |= (ascending[..., 1:] == ascending[..., :-1]).any(-1)
    if (bad & mask).any():
        token, column = np.argwhere(bad & mask)[0].tolist()
        raise RoutesError(
            f"the row of token {token} in layer {layers[column]} is "
            f"{experts[token, column].tolist()}, expected {topk} distinct ids from 0 to "
            f"{num_experts - 1}."
        )
    return Selection(experts, layers, mask, num_experts, tokens)
