"""A few seconds of benchmarks/stress.py; and that it would notice what it is there to notice."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import r3patch
from r3patch import Routes, testing

pytestmark = [pytest.mark.megatron, pytest.mark.slow, pytest.mark.foreign_routes]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def stress() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        with testing.megatron_on_cpu():
            yield importlib.import_module("stress")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_no_case_is_silently_wrong(stress: ModuleType) -> None:
    """120 random cases: none is silently different, broken, or refused without a fault."""
    cases = [stress.draw(seed) for seed in range(120)]
    outcomes = [stress.judge(case) for case in cases]
    assert sum(outcome.kind == "exact" for outcome in outcomes) > 60
    bad = [
        f"{case}\n{outcome.kind}: {outcome.text}"
        for case, outcome in zip(cases, outcomes, strict=True)
        if stress.bad(case, outcome)
    ]
    assert not bad, "\n".join(bad)


def case(stress: ModuleType, **fields: Any) -> Any:
    """Two microbatches in a reentrant checkpoint, unless said otherwise."""
    plain = {
        "seed": 1,
        "routing": "softmax",
        "nest": (("R", (0, 1)), 2),
        "outer": "",
        "schedule": "f0 f1 b0 b1",
        "gaps": 0.0,
        "measure": False,
        "feed": False,
        "threads": "",
    }
    return stress.Case(**{**plain, **fields})


def test_it_notices_rows_of_another_microbatch(stress: ModuleType) -> None:
    """A session that exchanges two microbatches is found wrong, and at the first move."""

    def crooked(model: Any, rows: list[Routes], **options: Any) -> Any:
        return r3patch.replay(model, rows[::-1], **options)

    assert stress.judge(case(stress)).kind == "exact"
    outcome = stress.judge(case(stress), crooked)
    assert (outcome.kind, outcome.move) == ("wrong", 0)


def test_it_notices_rows_of_other_tokens(stress: ModuleType) -> None:
    """Routes carry the tokens that the model gets: exchanged microbatches are refused at once."""

    def crooked(model: Any, rows: list[Routes], **options: Any) -> Any:
        return r3patch.replay(model, rows[::-1], **options)

    outcome = stress.judge(case(stress, tokens="strict"), crooked)
    assert (outcome.kind, outcome.move) == ("refused", 0)
    assert "token" in outcome.text


@pytest.mark.parametrize("split", [0, 1])
def test_it_compares_tokens_and_the_models_own_routes(stress: ModuleType, split: int) -> None:
    """A healthy case under alarm="raise" is one that the alarm looks at, with gaps too."""
    sessions = []

    def watched(model: Any, rows: list[Routes], **options: Any) -> Any:
        assert options["alarm"] == "raise"
        sessions.append(r3patch.replay(model, rows, **options))
        return sessions[-1]

    healthy = case(
        stress, tokens="check", healthy=True, gaps=0.1, ragged=True, split=split, nest=(0, 1, 2)
    )
    assert stress.judge(healthy, watched).kind == "exact"
    (session,) = sessions
    assert session.stats.agreement is not None
    assert session.stats.agreement > 0.8
    assert session.stats.token_checks[0].checked > 0


@pytest.mark.parametrize("split", [0, 1])
def test_it_notices_rows_that_are_not_spread(stress: ModuleType, split: int) -> None:
    """What stands in rows without routes is computed by the harness itself, chunk by chunk."""

    def live(model: Any, rows: list[Routes], **options: Any) -> Any:
        return r3patch.replay(model, rows, **{**options, "missing": "live"})

    spread = case(stress, missing="spread", gaps=0.5, ragged=True, split=split, nest=(0, 1, 2))
    assert stress.judge(spread).kind == "exact"
    assert stress.judge(spread, live).kind == "wrong"


def test_it_notices_a_wrong_recompute(stress: ModuleType) -> None:
    """Rows that change between forward and recompute give a wrong backward, not a wrong forward."""

    class Crooked:
        """An extension point that turns the rows by one in backward."""

        def __init__(self, rows: Routes, layer: int) -> None:
            self.ids = rows.select((layer,)).experts[:, 0].long()

        def get_replay_topk(self, scores: torch.Tensor, *args: Any) -> Any:
            ids = self.ids.roll(1, 0) if torch._C._current_graph_task_id() != -1 else self.ids
            ids = ids.gather(1, scores.detach().gather(1, ids).argsort(dim=1, descending=True))
            return scores.gather(1, ids), ids

    class Session:
        def __init__(self, model: Any, rows: list[Routes], **options: Any) -> None:
            self.routers, self.rows = model.routers, rows

        def __enter__(self) -> Session:
            for router in self.routers:
                router.router_replay = Crooked(self.rows[0], router.layer_number)
            return self

        def __exit__(self, *error: object) -> None:
            for router in self.routers:
                router.router_replay = None

    one = case(stress, schedule="f0 b0")
    outcome = stress.judge(one, Session)
    assert (outcome.kind, outcome.move) == ("wrong", 1)
    assert "recompute" in outcome.text
    assert "gradients" in outcome.text
    assert stress.judge(case(stress, nest=(0, 1, 2), schedule="f0 b0"), Session).kind == "exact"


def test_a_case_is_text_and_text_is_a_case(stress: ModuleType) -> None:
    """What is printed of a case can be given back to run it again."""
    for seed in range(200):
        drawn = stress.draw(seed)
        assert stress.Case.parse(str(drawn)) == drawn
        assert all(smaller != drawn for smaller in stress.simpler(drawn))
