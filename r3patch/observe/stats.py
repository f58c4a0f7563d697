"""What a session did, router by router, and over ranks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
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

#: Rows that an `Agreement` takes at the least.
ENOUGH_ROWS = 64
#: Below what it alarms: healthy runs are at 0.8 and more, routes of other tokens below 0.5.
_ALARMING = 0.5
_SHARED = 0.8


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
    wrong: int = 0
    """Of the checked ones: the model got another token than the one of the row."""


@dataclass(frozen=True)
class Agreement:
    """How far some rows agree with Megatron's own choice; sums, which merge over ranks.

    Chance is measured, as what one row's live choice shares with another row's: routers that prefer
    some experts have far more of it than ``topk / num_experts`` says.
    """

    rows: int = 0
    experts: int = 0  # topk of each row
    shared: int = 0  # of these, those that Megatron would have chosen too,
    by_chance: int = 0  # and those that it would have chosen for another row

    @property
    def chance(self) -> float | None:
        """The overlap of unrelated rows; None where no row was compared."""
        return self.by_chance / self.experts if self.experts else None

    @property
    def kappa(self) -> float | None:
        """``(overlap - chance) / (1 - chance)``, as Cohen's: 1 is equal, 0 is as by chance.

        None where fewer than 64 rows were compared.
        """
        return self.above_chance(self.shared / self.experts) if self.experts else None

    def above_chance(self, overlap: float) -> float | None:
        """The same of another overlap, with the chance of these rows."""
        if self.chance is None or self.rows < ENOUGH_ROWS:
            return None
        return 1.0 if self.chance == 1 else (overlap - self.chance) / (1 - self.chance)

    def alarming(self, overlap: float | None = None) -> bool:
        """Whether these rows, or others that share so much, hardly are of the model's own choice.

        Where most experts are shared by chance, a few near-ties are much above it: never above
        four fifths of all.
        """
        if not self.experts:
            return False
        overlap = self.shared / self.experts if overlap is None else overlap
        kappa = self.above_chance(overlap)
        return kappa is not None and kappa < _ALARMING and overlap < _SHARED

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


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
    token_checks: tuple[TokenCheck, ...] = ()  # by chunk, of every rank: which tokens were compared
    first_rows: Agreement = Agreement()  # of the session's first rows with Megatron's own choice
    alarmed: bool = False  # whether that, or what was measured, was less than routes should have

    @property
    def agreement(self) -> float | None:
        """`Agreement.kappa` of the first rows: 1 is equal, 0 is as by chance."""
        return self.first_rows.kappa

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
        agreement = {
            "kappa": self.agreement,
            "chance": self.first_rows.chance,
            "rows": self.first_rows.rows,
            "alarmed": self.alarmed,
        }
        return {
            "routers": [router.as_dict() for router in self.routers],
            "token_mismatch": self.token_mismatch,
            "token_checks": [asdict(check) for check in self.token_checks],
            "agreement": agreement if self.first_rows.rows else None,
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
            "tokens_checked": sum(check.checked for check in self.token_checks),
            "tokens_wrong": sum(check.wrong for check in self.token_checks),
            "agreement": self.agreement,
            "agreement_chance": self.first_rows.chance,
            "agreement_rows": self.first_rows.rows,
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
            self.token_checks + other.token_checks,
            self.first_rows + other.first_rows,
            self.alarmed or other.alarmed,
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
