"""Rows that belong to other tokens are told by name, and healthy sessions are not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import (
    BATCH,
    FULL,
    LENGTH,
    RECOMPUTE,
    TOKENS,
    batch,
    build,
    loss_of,
    random_routes,
)
from torch.utils.checkpoint import checkpoint

import r3patch
from r3patch import Routes
from r3patch.sessions import _tokens

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("cpu")]


def samples_of(model: Any, seeds: tuple[int, ...] = (1, 2)) -> list[list[Routes]]:
    """What the model chooses by itself for each sample of each microbatch, with its tokens."""
    with r3patch.record(model) as recording, torch.no_grad():
        for seed in seeds:
            loss_of(model, seed)
    found = []
    for seed, routes in zip(seeds, recording.routes, strict=True):
        samples = []
        for index in range(BATCH):
            rows = routes[torch.arange(index, TOKENS, BATCH)]
            valid = torch.arange(LENGTH) < LENGTH - 1  # the last token was never fed
            tokens = batch(seed)["input_ids"][index]
            samples.append(Routes(rows.experts, rows.layers, valid, num_experts=16, tokens=tokens))
        found.append(samples)
    return found


LAYOUT = r3patch.Layout(packed=False, seq_length=LENGTH)


def place(microbatches: list[list[Routes]]) -> list[Routes]:
    return [LAYOUT.place(samples) for samples in microbatches]


def batch_first(samples: list[Routes]) -> Routes:
    whole = [torch.cat([getattr(s, n) for s in samples]) for n in ("experts", "mask", "tokens")]
    return Routes(whole[0], samples[0].layers, whole[1], num_experts=16, tokens=whole[2])


def cut(sample: Routes, start: int, stop: int) -> Routes:
    """The sample without some tokens in its middle, filled up at its end."""
    rows = torch.cat([torch.arange(start), torch.arange(stop, LENGTH), torch.arange(start, stop)])
    return sample[rows]


Samples = list[list[Routes]]
FAULTS: dict[str, tuple[Callable[[Samples], list[Routes]], str]] = {
    "microbatches swapped": (lambda s: place(s[::-1]), "got the tokens of microbatch 1"),
    "samples swapped": (lambda s: place([s[0][::-1], s[1]]), r"samples in the order \[1, 0\]"),
    "batch order": (lambda s: [batch_first(s[0]), place(s)[1]], "in batch order, sample after"),
    "shifted": (
        lambda s: [place(s)[0][torch.arange(TOKENS).roll(2)], place(s)[1]],
        "shifted by -2",
    ),
    "an older batch": (lambda s: [place(s)[0], place(s)[0]], "an older batch"),
}


def warnings_of_ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    ours = [r for r in caplog.records if r.name.startswith("r3patch")]
    return [r for r in ours if r.levelno >= logging.WARNING]


@RECOMPUTE
@pytest.mark.parametrize("mode", ["check", "strict"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str, mode: Any, recompute: Any) -> None:
    """On leaving, before the optimizer step, or at once where that was asked for."""
    make, text = FAULTS[fault]
    model = build(**recompute)
    microbatches = make(samples_of(model))
    session = r3patch.replay(model, microbatches, tokens=mode)
    ran = []

    def run() -> None:
        with session:
            for seed in (1, 2):
                loss_of(model, seed).backward()
                ran.append(seed)

    with pytest.raises(r3patch.ReplayError, match=text):
        run()
    assert (len(ran) == 2) == (mode == "check")


@RECOMPUTE
@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("depths", [1, 2])
def test_healthy_sessions_are_silent(
    measure: bool, recompute: Any, depths: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever MTP embeds, and whatever a recompute embeds again: every token is compared once."""
    model = build(num_layers=4, mtp_num_layers=depths, **recompute)
    microbatches = place(samples_of(model))
    with r3patch.replay(model, microbatches, tokens="strict", measure=measure) as session:
        for seed in (1, 2):
            loss_of(model, seed).backward()
    (check,) = session.stats.token_checks
    assert (check.checked, check.why_not) == (2 * BATCH * (LENGTH - 1), "")
    assert session.stats.agreement == 1
    assert not warnings_of_ours(caplog)


@pytest.mark.foreign_routes
def test_tokens_can_be_ignored() -> None:
    """For trainers that replace input tokens on purpose; the stats say so."""
    model = build()
    with r3patch.replay(model, place(samples_of(model)[::-1]), tokens="ignore") as session:
        for seed in (1, 2):
            loss_of(model, seed)
    assert session.stats.token_checks[0].why_not == 'tokens="ignore"'


def test_routes_without_tokens_are_not_checked() -> None:
    """And the stats say what to do about it."""
    model = build()
    with r3patch.replay(model, [random_routes(model, 1)]) as session:
        loss_of(model, 1)
    assert "pass tokens= to decode" in session.stats.token_checks[0].why_not


def test_a_failed_pass_does_not_shift_the_comparison() -> None:
    """The ids that a failed forward has embedded are not the next one's."""
    model = build()
    microbatches = place(samples_of(model))
    router = r3patch.routers(model, "main")[0].module

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with r3patch.replay(model, microbatches, tokens="strict") as session:
        handle = router.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            loss_of(model, 1)
        handle.remove()
        for seed in (1, 2):
            loss_of(model, seed)
    assert session.stats.token_checks[0].checked == 2 * BATCH * (LENGTH - 1)


@pytest.mark.parametrize("whole", [False, True], ids=["plain", "in_a_checkpoint"])
def test_tokens_where_no_pass_is_seen(whole: bool) -> None:
    """As in combined 1F1B: ids that MTP or a recompute embeds again excuse no others."""
    model = build(num_layers=4)
    microbatches = place(samples_of(model))

    def forward(seed: int) -> torch.Tensor:
        loss: torch.Tensor = model.forward(**batch(seed)).mean()  # calls no hook of the model
        return loss

    def run() -> None:
        with r3patch.replay(model, microbatches, tokens="strict"):
            loss = checkpoint(forward, 1, use_reentrant=False) if whole else forward(1)
            loss.backward()
            forward(1)

    with pytest.raises(r3patch.ReplayError, match="microbatch 1, row 0: its routes are those"):
        run()


def test_one_other_token_is_not_another_microbatch() -> None:
    """Rows that are nearly those of their own microbatch are not told to be of another order."""
    model = build()
    (routes,) = place(samples_of(model, (1,)))
    tokens = routes.tokens
    assert tokens is not None
    tokens[6] += 1
    routes = Routes(routes.experts, routes.layers, routes.valid, num_experts=16, tokens=tokens)
    with (
        pytest.raises(r3patch.ReplayError, match="Other tokens in rows 6 to 6"),
        r3patch.replay(model, [routes]),
    ):
        loss_of(model, 1)


def test_ids_are_let_go_when_the_device_has_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a slow device, and its comparisons are kept until it has come so far."""
    model, seeds = build(mtp_num_layers=None), (1, 2, 3, 4)
    microbatches = place(samples_of(model, seeds))
    ready, kept = [False], []
    monkeypatch.setattr(_tokens._Comparison, "ready", lambda _: ready[0])
    with r3patch.replay(model, microbatches) as session:
        for seed in seeds:
            ready[0] = seed == 3
            loss_of(model, seed)
            kept.append(len(session._queues[0].tokens._pending))
    assert kept == [1, 2, 0, 1]
    assert session.stats.token_checks[0].checked == len(seeds) * BATCH * (LENGTH - 1)


@pytest.mark.foreign_routes
def test_a_fault_on_a_slow_device_is_told_on_leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the ids of its own microbatch, whatever came after it; and counted in the stats."""
    model = build(mtp_num_layers=None)
    one, _ = place(samples_of(model))
    monkeypatch.setattr(_tokens._Comparison, "ready", lambda _: False)
    session = r3patch.replay(model, [one, one])

    def run() -> None:
        with session:
            for seed in (1, 2):
                loss_of(model, seed)

    with pytest.raises(r3patch.ReplayError, match=r"microbatch 1, row 0: .* an older batch"):
        run()
    (check,) = session.stats.token_checks
    assert (check.checked, check.wrong > 15) == (2 * BATCH * (LENGTH - 1), True)


def test_ids_that_are_embedded_twice_are_not_compared() -> None:
    """A model that embeds something else before its decoder: no false alarm, and a reason."""
    model = build(mtp_num_layers=None)
    microbatches = place(samples_of(model))

    def embed_others(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        if not busy:
            busy.append(True)
            module(kwargs["input_ids"].flip(0), kwargs["position_ids"])
            busy.clear()

    busy: list[bool] = []
    model.embedding.register_forward_hook(embed_others, with_kwargs=True)
    with r3patch.replay(model, microbatches, tokens="strict") as session:
        for seed in (1, 2):
            loss_of(model, seed)
    (check,) = session.stats.token_checks
    assert (check.checked, check.why_not[:26]) == (0, "ids are embedded twice bef")


# The alarm


def shifted_layers(routes: Routes) -> Routes:
    return Routes(
        routes.experts.roll(1, 1), routes.layers, routes.mask, num_experts=16, tokens=routes.tokens
    )


@pytest.mark.foreign_routes
@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("recompute", [{}, FULL], ids=["no_recompute", "full"])
def test_the_alarm_sees_what_tokens_cannot(
    recompute: Any, measure: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Routes of the right tokens and the wrong layers: one warning for the session."""
    model = build(num_layers=4, **recompute)
    microbatches = [shifted_layers(routes) for routes in place(samples_of(model))]
    with r3patch.replay(model, microbatches, measure=measure) as session:
        for seed in (1, 2):
            loss_of(model, seed).backward()
    (record,) = warnings_of_ours(caplog)
    assert "hardly are of these tokens, layers or weights" in record.message
    assert session.stats.agreement is not None
    assert session.stats.agreement < 0.5


def test_the_alarm_can_raise_and_be_off(caplog: pytest.LogCaptureFixture) -> None:
    """It is the session's choice, and the environment's."""
    model = build(num_layers=4)
    loud = r3patch.replay(model, [random_routes(model, 1)], alarm="raise")
    with pytest.raises(r3patch.ReplayError, match="hardly"), loud:
        loss_of(model, 1)
    with r3patch.replay(model, [random_routes(model, 1)], alarm="off") as quiet:
        loss_of(model, 1)
    assert not warnings_of_ours(caplog)
    assert quiet.stats.agreement is None


@pytest.mark.feature("config:mlp_chunks_for_training")
@pytest.mark.foreign_routes
@pytest.mark.parametrize("recompute", [{}, FULL], ids=["no_recompute", "full"])
def test_the_alarm_looks_at_chunked_mlps(recompute: Any) -> None:
    """Piece by piece: own routes agree, those of other layers do not."""
    model = build(num_layers=4, mlp_chunks_for_training=5, **recompute)
    own = place(samples_of(model))
    for microbatches in (own, [shifted_layers(routes) for routes in own]):
        with r3patch.replay(model, microbatches, alarm="warn") as session:
            for seed in (1, 2):
                loss_of(model, seed).backward()
        rows = session.stats.first_rows
        assert rows.rows >= 64
        assert (rows.kappa == 1) == (not rows.alarming()) == (microbatches is own)


def test_the_alarm_waits_for_rows() -> None:
    """A session that begins with samples without routes is looked at where it has some."""
    model = build(num_layers=4)
    one, two = place(samples_of(model))
    missing = Routes.missing(TOKENS, one.layers, one.topk, 16, tokens=one.tokens)
    with r3patch.replay(model, [missing, two], alarm="raise") as session:
        for seed in (1, 2):
            loss_of(model, seed)
    assert (session.stats.agreement, session.stats.first_rows.rows) == (1, 3 * 22)


def test_the_alarm_stops_when_it_has_seen_enough() -> None:
    """64 rows of a chunk, and the rest of their microbatch: the others cost nothing."""
    model = build(num_layers=4)
    with r3patch.replay(model, place(samples_of(model, (1, 2, 3)))) as session:
        for seed in (1, 2, 3):
            loss_of(model, seed)
    assert session.stats.first_rows.rows == 3 * 22
