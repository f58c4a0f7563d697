"""What a session did, router by router, and over ranks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from r3patch._errors import ReplayError
from r3patch.labels.scope import MAIN, MTP

#: The fields of `RouterStats` that are counts: those of several ranks or sessions add up.
COUNTED = (
    "forward_calls",
    "recompute_calls",
    "rows_replayed",
    "rows_live",
    "rows_spread",
    "rows_measured",
    "rows_differing",
    "experts_shared",
    "recompute_rows_measured",
    "recompute_rows_differing",
)


@dataclass(frozen=True)
class RouterStats:
    """Counts of one router. A row is one token in one forward call of one router.

    The measured fields are 0 without ``measure=True``; ``mismatch`` and ``overlap`` are then None.
    """

    name: str
    chunk: int
    scope: str
    layer_number: int | None
    forward_calls: int = 0
    recompute_calls: int = 0
    rows_replayed: int = 0  # took the rollout's experts
    rows_live: int = 0  # took Megatron's own top-k: MTP rows, and rows without rollout routes
    rows_spread: int = 0  # had no rollout routes and were spread evenly (missing="spread")
    topk: int = 0
    hash_routed: bool = False  # experts follow from the token's id: left alone, and counted
    rows_measured: int = 0  # replayed rows compared with Megatron's own choice,
    rows_differing: int = 0  # those whose set of experts differs,
    experts_shared: int = 0  # and the experts in both sets, summed over these rows
    recompute_rows_measured: int = 0  # rows whose live choice in recompute was compared, with
    recompute_rows_differing: int = 0  # the forward's: above 0 is a wrong match, or a near-tie

    @property
    def mismatch(self) -> float | None:
        """Fraction of the measured rows whose experts are not the live ones, as a set."""
        return self.rows_differing / self.rows_measured if self.rows_measured else None

    @property
    def overlap(self) -> float | None:
        """Mean fraction of a measured row's experts that Megatron would have chosen too."""
        rows = self.rows_measured * self.topk
        return self.experts_shared / rows if rows else None

    @property
    def key(self) -> tuple[str, object]:
        """The router's identity over ranks: main layer numbers are global, MTP ones are not."""
        return (self.scope, self.layer_number if self.scope == MAIN else self.name)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mismatch": self.mismatch, "overlap": self.overlap}

    def __add__(self, other: RouterStats) -> RouterStats:
        return replace(self, **{f: getattr(self, f) + getattr(other, f) for f in COUNTED})


@dataclass(frozen=True)
class TokenCheck:
    """How many tokens of one chunk were compared with those that its routes were computed for."""

    chunk: int
    checked: int
    why_not: str
    """Why none was; empty if some were."""


@dataclass(frozen=True)
class ReplayStats:
    """What a session did on this rank, or, merged, on several.

    ``tokens`` has a byte for each token, in the order of the microbatches: 0 where no row was
    measured, 1 where Megatron would have chosen the same experts in every layer, 2 where it would
    not in at least one. It is empty without ``measure=True``.
    """

    routers: tuple[RouterStats, ...]
    tokens: bytes = b""
    seconds: float = 0.0  # host time of preparing and enqueueing the rows
    token_checks: tuple[TokenCheck, ...] = ()  # by chunk: which tokens were compared
    agreement: float | None = None  # of the first rows with Megatron's choice, 0: as by chance

    @property
    def token_mismatch(self) -> float | None:
        """Fraction of the measured tokens that differ in at least one layer."""
        measured = len(self.tokens) - self.tokens.count(0)
        return self.tokens.count(2) / measured if measured else None

    def total(self, scope: str) -> RouterStats:
        """The sums over the routers of a scope, "main" or "mtp"; its layer number is None."""
        total = RouterStats(name=f"all {scope}", chunk=-1, scope=scope, layer_number=None)
        for router in self.routers:
            if router.scope == scope:
                total = replace(total, topk=router.topk) + router
        return total

    def as_dict(self) -> dict[str, Any]:
        """Plain data: numbers, strings and lists, ready for JSON."""
        return {
            "routers": [router.as_dict() for router in self.routers],
            "token_mismatch": self.token_mismatch,
            "seconds": self.seconds,
        }

    def metrics(self) -> dict[str, float]:
        """The session as flat numbers for a logger: the same names every time, nan of nothing.

        docs/observe.md says what each is. Rates are of the main routers of this object: merge the
        stats of all ranks first, or log each rank under a name of its own.
        """
        main, mtp = self.total(MAIN), self.total(MTP)
        layers = [r.mismatch for r in self.routers if r.scope == MAIN and r.mismatch is not None]
        again, otherwise = main.recompute_rows_measured, main.recompute_rows_differing
        found = {
            "rows_replayed": main.rows_replayed,
            "rows_live": main.rows_live,
            "rows_spread": main.rows_spread,
            "forward_calls": main.forward_calls,
            "recompute_calls": main.recompute_calls,
            "mismatch": main.mismatch,
            "worst_layer_mismatch": max(layers, default=None),
            "overlap": main.overlap,
            "token_mismatch": self.token_mismatch,
            "recompute_mismatch": otherwise / again if again else None,
            "mtp_rows_replayed": mtp.rows_replayed,
            "mtp_rows_live": mtp.rows_live,
            "seconds": self.seconds,
        }
        return {f"r3/{k}": math.nan if v is None else float(v) for k, v in found.items()}

    def merge(self, *others: ReplayStats) -> ReplayStats:
        """This and other ranks' stats as one.

        A router that several ranks have (data parallel) is summed, and their tokens count one by
        one. Ranks without a common router (pipeline stages) saw the same tokens: a token differs
        where it differs on any of them. Gather the objects by ``torch.distributed.
        all_gather_object`` first, from the ranks that route tokens of their own.
        """
        merged = self
        for other in others:
            merged = merged._merge(other)
        return merged

    def _merge(self, other: ReplayStats) -> ReplayStats:
        routers = {router.key: router for router in self.routers}
        main = {router.key for router in self.routers if router.scope == MAIN}
        common = any(router.key in main for router in other.routers)
        for router in other.routers:
            known = routers.get(router.key)
            routers[router.key] = router if known is None else known + router
        return ReplayStats(
            tuple(routers.values()),
            _merge_tokens(self.tokens, other.tokens, same_tokens=not common),
            self.seconds + other.seconds,
        )


def _merge_tokens(a: bytes, b: bytes, *, same_tokens: bool) -> bytes:
    if not same_tokens or not a or not b:
        return a + b
    if len(a) != len(b):
        raise ReplayError(
            f"ranks of different layers measured {len(a)} and {len(b)} tokens. Merge the pipeline "
            "stages of each data-parallel rank first, then those."
        )
    return bytes(map(max, a, b))
