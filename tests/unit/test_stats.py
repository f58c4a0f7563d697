"""ReplayStats: totals, and merging over ranks."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from r3patch import ReplayError, ReplayStats
from r3patch.observe.stats import COUNTED, Agreement, RouterStats, TokenCheck


def router(layer: int, scope: Any = "main", **counts: Any) -> RouterStats:
    return RouterStats(f"{scope}.{layer}", 0, scope, layer, topk=4, **counts)


def test_total_sums_one_scope() -> None:
    """total("main") sums the main routers and no others."""
    stats = ReplayStats((router(2, rows_replayed=3), router(3, rows_replayed=4), router(1, "mtp")))
    assert stats.total("main").rows_replayed == 7
    assert stats.total("mtp").rows_replayed == 0


def test_unmeasured_figures_are_none() -> None:
    """Without measure=True there is no mismatch to report, rather than a mismatch of 0."""
    stats = ReplayStats((router(2, rows_replayed=3),))
    assert (stats.total("main").mismatch, stats.token_mismatch) == (None, None)


def test_mismatch_and_overlap() -> None:
    """Mismatch is per row, overlap per expert of a row."""
    total = ReplayStats((router(2, rows_measured=10, rows_differing=2, experts_shared=37),)).total(
        "main"
    )
    assert (total.mismatch, total.overlap) == (0.2, 37 / 40)


def test_data_parallel_ranks_add_up() -> None:
    """Ranks with the same routers are summed, and their tokens stand side by side."""
    a = ReplayStats((router(2, rows_replayed=3),), b"\1\2")
    b = ReplayStats((router(2, rows_replayed=5),), b"\2\0\2")
    merged = a.merge(b)
    assert merged.total("main").rows_replayed == 8
    assert merged.tokens == b"\1\2\2\0\2"
    assert merged.token_mismatch == 3 / 4


def test_pipeline_stages_saw_the_same_tokens() -> None:
    """A token differs where it differs on any stage; layers of both stages are there."""
    a = ReplayStats((router(2), router(1, "mtp")), b"\1\2\1\0")
    b = ReplayStats((router(3), router(1, "mtp", rows_live=2)), b"\1\1\2\0")
    merged = a.merge(b)
    assert merged.tokens == b"\1\2\2\0"
    assert [r.layer_number for r in merged.routers if r.scope == "main"] == [2, 3]
    assert merged.total("mtp").rows_live == 2


def test_merging_keeps_token_checks_and_agreement() -> None:
    """A rank with tokens of others, or an alarm, does not vanish among healthy ones."""
    healthy = ReplayStats((), token_checks=(TokenCheck(0, 40, ""),), first_rows=agreed(64, 200))
    wrong = ReplayStats((), b"", 0.0, (TokenCheck(0, 40, "", 30),), agreed(64, 64), alarmed=True)
    figures = healthy.merge(wrong, healthy).metrics()
    assert (figures["r3/tokens_checked"], figures["r3/tokens_wrong"]) == (120, 30)
    assert figures["r3/agreement_rows"] == 192
    assert healthy.merge(wrong).alarmed
    assert healthy.agreement == (200 / 256 - 0.25) / 0.75
    assert wrong.agreement == 0


def agreed(rows: int, shared: int) -> Agreement:
    """Of top-4 rows, a quarter of which is shared by chance."""
    return Agreement(rows, 4 * rows, shared, rows)


@pytest.mark.parametrize(
    ("found", "kappa"),
    [(Agreement(), None), (agreed(63, 200), None), (Agreement(64, 256, 200, 256), 1.0)],
)
def test_agreement_needs_rows_and_another_choice(found: Agreement, kappa: float | None) -> None:
    """Fewer than 64 rows say nothing; a router that always chooses the same cannot disagree."""
    assert found.kappa == kappa


@pytest.mark.parametrize(
    ("shared", "by_chance", "alarming"),
    [(250, 64, False), (150, 64, True), (64, 64, True), (212, 200, False), (204, 200, True)],
    ids=["healthy", "foreign in part", "foreign", "near ties", "below four fifths"],
)
def test_agreement_alarms_below_half_above_chance(
    shared: int, by_chance: int, alarming: bool
) -> None:
    """But not where nearly all is shared by chance: there a near-tie is half of what is above."""
    assert Agreement(64, 256, shared, by_chance).alarming() == alarming


def test_stages_of_different_ranks_are_refused() -> None:
    """Merging stages that saw different numbers of tokens says in which order to merge."""
    with pytest.raises(ReplayError, match="pipeline stages of each data-parallel rank first"):
        ReplayStats((router(2),), b"\1").merge(ReplayStats((router(3),), b"\1\1"))


def test_as_dict_is_json() -> None:
    """as_dict() is plain data."""
    stats = ReplayStats((router(2, rows_measured=2, rows_differing=1),), b"\1\2", 0.5)
    data = json.loads(json.dumps(stats.as_dict()))
    assert data["routers"][0]["mismatch"] == 0.5
    assert data["token_mismatch"] == 0.5


def test_metrics_are_flat_floats_of_stable_names() -> None:
    """The same keys with and without measure, nan for what was not measured; rates of main only."""
    counts = {"rows_replayed": 30, "rows_measured": 20, "experts_shared": 70}
    measured = ReplayStats(
        (
            router(2, rows_differing=10, **counts),
            router(3, rows_differing=0, **counts),
            router(1, "mtp", rows_live=8),
        ),
        b"\1\2\2\0",
        0.5,
    ).metrics()
    plain = ReplayStats((router(2, rows_replayed=3),)).metrics()
    assert list(measured) == list(plain)
    assert all(type(value) is float for value in (*measured.values(), *plain.values()))
    assert measured["r3/mismatch"] == 10 / 40
    assert measured["r3/worst_layer_mismatch"] == 10 / 20
    assert measured["r3/overlap"] == 140 / 160
    assert measured["r3/token_mismatch"] == 2 / 3
    assert (measured["r3/rows_replayed"], measured["r3/mtp_rows_live"]) == (60, 8)
    assert measured["r3/mtp_rows_replayed"] == 0
    unmeasured = {name for name, value in plain.items() if math.isnan(value)}
    assert unmeasured == {
        f"r3/{name}"
        for name in (
            "mismatch",
            "worst_layer_mismatch",
            "overlap",
            "token_mismatch",
            "recompute_mismatch",
            "agreement",
            "agreement_chance",
        )
    }


def test_every_metric_is_in_the_documented_table() -> None:
    """docs/observe.md names the metrics, no more and no fewer."""
    text = (Path(__file__).parents[2] / "docs" / "observe.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(r3/\w+)`", text, re.MULTILINE)
    assert documented == list(ReplayStats(()).metrics())


def test_every_count_of_a_router_adds_up() -> None:
    """A count that is left out of the list would be that of one rank, in silence."""
    numbers = {f.name for f in dataclasses.fields(RouterStats) if f.type == "int"}
    assert set(COUNTED) == numbers - {"chunk", "topk"}
