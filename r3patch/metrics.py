"""The field's measures: the policy gap, route mismatch, and expert load.

Sums and counts in float64 and integers, so that ranks and microbatches merge without error. The
measure of nothing (no token, no row) is ``nan``, never 0, which would read as "all is well".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import reduce
from operator import add

import torch
from torch import Tensor

from r3patch._errors import RoutesError
from r3patch.rows.overlap import suspicious_overlap
from r3patch.rows.routes import Routes

__all__ = [
    "ExpertLoad",
    "PolicyGap",
    "RouteMismatch",
    "expert_load",
    "imbalance",
    "policy_gap",
    "route_mismatch",
    "suspicious_overlap",
]


@dataclass(frozen=True)
class PolicyGap:
    """How far the policy that trains is from the one that generated, over ``tokens`` tokens.

    With ``delta = train_logprob - rollout_logprob`` (natural logarithm) of the sampled tokens.
    """

    tokens: int = 0
    sum_abs: float = 0.0
    sum_squared: float = 0.0
    sum_k1: float = 0.0
    sum_k3: float = 0.0
    tokens_above_2: int = 0
    tokens_above_5: int = 0
    max_abs: float = 0.0

    @property
    def mean_abs(self) -> float:
        """Mean of ``|delta|``."""
        return _ratio(self.sum_abs, self.tokens)

    @property
    def mean_squared(self) -> float:
        """Mean of ``delta ** 2``; half of it is the k2 estimate of the KL divergence."""
        return _ratio(self.sum_squared, self.tokens)

    @property
    def k1(self) -> float:
        """Estimate of KL(rollout || train) as the mean of ``-delta``: unbiased, can be negative."""
        return _ratio(self.sum_k1, self.tokens)

    @property
    def k3(self) -> float:
        """Estimate of KL(rollout || train) as the mean of ``exp(delta) - 1 - delta``: never < 0."""
        return _ratio(self.sum_k3, self.tokens)

    @property
    def above_2(self) -> float:
        """Fraction of tokens whose probabilities differ by a factor of more than 2, either way."""
        return _ratio(self.tokens_above_2, self.tokens)

    @property
    def above_5(self) -> float:
        """Fraction of tokens whose probabilities differ by a factor of more than 5, either way."""
        return _ratio(self.tokens_above_5, self.tokens)

    def merge(self, *others: PolicyGap) -> PolicyGap:
        """The gap over the tokens of this and other ranks or microbatches."""
        parts = (self, *others)
        sums = {f.name: sum(getattr(p, f.name) for p in parts) for f in fields(self)}
        # Not max(): it drops a nan or keeps it, depending on the order.
        return PolicyGap(**sums | {"max_abs": reduce(_largest, [p.max_abs for p in parts])})

    def as_dict(self) -> dict[str, float]:
        """The measures by name, for a logger or ``session.note(**gap.as_dict())``."""
        names = ("mean_abs", "mean_squared", "k1", "k3", "above_2", "above_5", "max_abs", "tokens")
        return {name: float(getattr(self, name)) for name in names}


def policy_gap(
    train_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor | None = None
) -> PolicyGap:
    """Compare the log-probs of the same sampled tokens under trainer and rollout engine.

    A token whose log-prob is nan or infinite is counted, and its gap is what the sums then are.

    Args:
        train_logprobs: any shape, any floating dtype, natural logarithm; any device.
        rollout_logprobs: the same shape.
        mask: the same shape, bool or 0 and 1: the tokens that count (responses, not padding).

    Raises:
        ValueError: the shapes differ, or the mask holds something else than 0 and 1.
    """
    for name, tensor in (("rollout_logprobs", rollout_logprobs), ("mask", mask)):
        if tensor is not None and tensor.shape != train_logprobs.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected that of train_logprobs, "
                f"{tuple(train_logprobs.shape)}: one number per token, shifted alike."
            )
    train = train_logprobs.detach().double()
    delta = train - rollout_logprobs.detach().to(train)
    if mask is not None:
        kept = mask.bool()
        if mask.dtype != torch.bool and not torch.equal(kept.to(mask), mask):
            raise ValueError("mask holds other numbers than 0 and 1: weights are not supported.")
        delta = delta[kept.to(delta.device)]
    if delta.numel() == 0:
        return PolicyGap()
    size = delta.abs()
    sums = [size, delta.square(), -delta, delta.expm1() - delta]
    sums += [size > math.log(2), size > math.log(5)]
    # One transfer for all of them: the tensors may be on a device.
    numbers = torch.stack([*(part.sum().double() for part in sums), size.max()]).tolist()
    absolute, squared, k1, k3, above_2, above_5, largest = numbers
    return PolicyGap(delta.numel(), absolute, squared, k1, k3, int(above_2), int(above_5), largest)


@dataclass(frozen=True)
class RouteMismatch:
    """In how far two selections of experts differ. Tuples have an entry for each of ``layers``."""

    layers: tuple[int, ...]
    topk: int
    rows: tuple[int, ...]  # rows that are valid in both
    rows_differing: tuple[int, ...]  # rows whose set of experts differs
    experts_shared: tuple[int, ...]  # experts in both sets, summed over the rows
    tokens: int  # tokens with at least one row
    tokens_differing: int  # tokens of which at least one row differs

    @property
    def mismatch(self) -> float:
        """Fraction of rows whose set of experts differs, over all layers."""
        return _ratio(sum(self.rows_differing), sum(self.rows))

    @property
    def mismatch_by_layer(self) -> tuple[float, ...]:
        """`mismatch` of each of ``layers``."""
        return tuple(map(_ratio, self.rows_differing, self.rows))

    @property
    def token_mismatch(self) -> float:
        """Fraction of tokens that differ in at least one layer."""
        return _ratio(self.tokens_differing, self.tokens)

    @property
    def overlap(self) -> float:
        """Mean fraction of a row's experts that the other selection has too, over all layers."""
        return _ratio(sum(self.experts_shared), sum(self.rows) * self.topk)

    @property
    def overlap_by_layer(self) -> tuple[float, ...]:
        """`overlap` of each of ``layers``."""
        rows = (rows * self.topk for rows in self.rows)
        return tuple(map(_ratio, self.experts_shared, rows))

    def merge(self, *others: RouteMismatch) -> RouteMismatch:
        """The mismatch over the tokens of this and of other microbatches or data-parallel ranks.

        Raises:
            RoutesError: the layers or ``topk`` differ.
        """
        for other in others:
            _check_same(self, other, "layers", "topk")
        parts = (self, *others)
        return RouteMismatch(
            self.layers,
            self.topk,
            _sums([part.rows for part in parts]),
            _sums([part.rows_differing for part in parts]),
            _sums([part.experts_shared for part in parts]),
            sum(part.tokens for part in parts),
            sum(part.tokens_differing for part in parts),
        )


def route_mismatch(a: Routes, b: Routes) -> RouteMismatch:
    """Compare two selections for the same tokens, row by row as sets; only rows valid in both.

    Raises:
        RoutesError: the tokens, the set of layers, ``topk`` or ``num_experts`` differ.
    """
    _check_same(a, b, "num_tokens", "topk", "num_experts")
    if set(a.layers) != set(b.layers):
        raise RoutesError(
            f"a has layers {list(a.layers)} and b {list(b.layers)}: compare the common ones, "
            "a.select(layers) and b.select(layers)."
        )
    b = b.select(a.layers)
    valid = a.mask & b.mask
    # Rotations instead of all pairs at once: no [num_tokens, num_layers, topk, topk] in memory.
    common = torch.zeros(valid.shape, dtype=torch.int16, device="cpu")
    for turn in range(a.topk):
        common += (a.experts == b.experts.roll(turn, -1)).sum(-1, dtype=torch.int16)
    differs = (common < a.topk) & valid
    return RouteMismatch(
        a.layers,
        a.topk,
        tuple(valid.sum(0).tolist()),
        tuple(differs.sum(0).tolist()),
        tuple((common * valid).sum(0).tolist()),
        int(valid.any(1).sum()),
        int(differs.any(1).sum()),
    )


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """How many rows each expert got, real tokens and padding apart."""

    layers: tuple[int, ...]
    real: Tensor  # [num_layers, num_experts] int64
    padding: Tensor  # [num_layers, num_experts] int64
    invalid: Tensor  # [num_layers] int64: rows without experts

    @property
    def imbalance(self) -> tuple[float, ...]:
        """By layer the load of the fullest expert over the mean, real rows only; 1 is even."""
        return imbalance(self.real)

    def merge(self, *others: ExpertLoad) -> ExpertLoad:
        """The load of this and of other microbatches or data-parallel ranks.

        Raises:
            RoutesError: the layers or the numbers of experts differ.
        """
        for other in others:
            _check_same(self, other, "layers", "num_experts")
        parts = (self, *others)
        sums = (reduce(add, [getattr(p, n) for p in parts]) for n in ("real", "padding", "invalid"))
        return ExpertLoad(self.layers, *sums)

    @property
    def num_experts(self) -> int:
        """Experts per layer."""
        return self.real.shape[1]


def expert_load(routes: Routes, padding: Tensor | None = None) -> ExpertLoad:
    """Count the rows of each expert.

    Args:
        routes: of a sample or a microbatch. Its invalid rows have no experts: they are counted as
            rows only.
        padding: ``[num_tokens]`` bool, True for padding; None: no token is. Recorded routes hold
            what the model chose for padding as well.

    Raises:
        RoutesError: ``padding`` has another shape or dtype.
    """
    if padding is None:
        padding = torch.zeros(routes.num_tokens, dtype=torch.bool, device="cpu")
    if padding.shape != (routes.num_tokens,) or padding.dtype != torch.bool:
        raise RoutesError(
            f"padding is {padding.dtype} {tuple(padding.shape)}, expected bool "
            f"({routes.num_tokens},): one flag per token."
        )
    valid, is_padding = routes.mask, padding.cpu().unsqueeze(1)
    real, padded = _counts(routes, valid & ~is_padding), _counts(routes, valid & is_padding)
    return ExpertLoad(routes.layers, real, padded, (~valid).sum(0))


def imbalance(counts: Tensor) -> tuple[float, ...]:
    """The largest entry over the mean of each row of ``[num_layers, num_experts]``."""
    total = counts.sum(1).tolist()
    return tuple(
        _ratio(top * counts.shape[1], n)
        for top, n in zip(counts.amax(1).tolist(), total, strict=True)
    )


def _counts(routes: Routes, rows: Tensor) -> Tensor:
    """``[num_layers, num_experts]`` int64 over the marked rows."""
    experts = routes.experts.unbind(1)
    counts = [
        torch.bincount(ids[kept].flatten().int(), minlength=routes.num_experts)
        for ids, kept in zip(experts, rows.unbind(1), strict=True)
    ]
    # `stack` of no layers fails.
    return torch.stack(counts) if counts else routes.experts.new_zeros(0, routes.num_experts).long()


def _sums(columns: list[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*columns, strict=True)))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _largest(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _check_same(a: object, b: object, *names: str) -> None:
    for name in names:
        left, right = getattr(a, name), getattr(b, name)
        if left != right:
            raise RoutesError(f"{name} is {left} in one and {right} in the other; they must agree.")
