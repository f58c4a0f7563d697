"""A whole model with MTP on the card: rows, bits, dtypes, streams, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from card import DTYPES, batch, build, keep_busy, own_routes

import r3patch
from r3patch import testing

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("megatron", "repeatable")]

DTYPE = pytest.mark.parametrize("dtype", DTYPES)
RECOMPUTE = pytest.mark.parametrize(
    "recompute", [{}, tiny.FULL, tiny.SELECTIVE], ids=["no_recompute", "full", "selective_moe"]
)


@DTYPE
@tiny.ROUTING
def test_a_plain_step_repeats(dtype: str, routing: Any) -> None:
    """Without r3patch: what differs here to the bit, no session can hold equal."""
    model = build(**DTYPES[dtype], **routing)
    tiny.assert_equal(tiny.step(model), tiny.step(model))


@DTYPE
@RECOMPUTE
@tiny.ROUTING
def test_recorded_then_replayed_is_the_plain_step(dtype: str, recompute: Any, routing: Any) -> None:
    """Recorded rows are the maps that hooks see, and losses and gradients equal to the bit."""
    model = build(**DTYPES[dtype], **recompute, **routing)
    plain, own = tiny.step(model), own_routes(model)
    with r3patch.record(model) as recording:
        tiny.assert_equal(tiny.step(model), plain)
    for got, want in zip(recording.routes, own, strict=True):
        assert torch.equal(got.experts.sort(-1).values, want.experts.sort(-1).values)
    with r3patch.replay(model, recording.routes):
        tiny.assert_equal(tiny.step(model), plain)
    shuffled = [tiny.shuffled(routes) for routes in recording.routes]
    with r3patch.replay(model, shuffled, measure=True) as session:
        tiny.assert_equal(tiny.step(model), plain)
    total = session.stats.total("main")
    assert total.rows_measured == total.rows_replayed > 0 == total.rows_differing
    tiny.assert_untouched(model)


@DTYPE
@RECOMPUTE
def test_rows_without_routes_are_the_models_own(dtype: str, recompute: Any) -> None:
    """A third of the rows, or all: the model's own routes elsewhere make it the plain step."""
    model = build(**DTYPES[dtype], **recompute)
    plain, own = tiny.step(model), own_routes(model)
    everywhere = [r3patch.Routes.missing(tiny.TOKENS, tiny.layers(model), 4, tiny.EXPERTS)] * 2
    for microbatches in ([tiny.with_gaps(routes) for routes in own], everywhere):
        for measure in (False, True):
            with r3patch.replay(model, microbatches, measure=measure):
                tiny.assert_close(tiny.step(model), plain)
    with r3patch.replay(model, everywhere):  # Megatron's ids in Megatron's order
        tiny.assert_equal(tiny.step(model), plain)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_megatrons_schedule(microbatches: int, device: torch.device) -> None:
    """`testing.train_step` with tokens checked: the bits of the plain step, and no alarm."""
    chunks = [tiny.build().to(device)]
    batches = [tiny.here(each) for each in testing.random_batches(num_microbatches=microbatches)]

    def step() -> dict[str, torch.Tensor]:
        chunks[0].zero_grad()
        losses = testing.train_step(chunks, batches)
        return {f"loss {i}": loss for i, loss in enumerate(losses)} | tiny.gradients(chunks[0])

    plain = step()
    with r3patch.record(chunks) as recording:
        testing.train_step(chunks, batches, forward_only=True)
    rows = [
        r3patch.Routes(
            routes.experts,
            routes.layers,
            num_experts=routes.num_experts,
            tokens=each["input_ids"].t().flatten(),
        )
        for routes, each in zip(recording.routes, batches, strict=True)
    ]
    with r3patch.replay(chunks, rows, alarm="raise", tokens="strict") as session:
        tiny.assert_equal(step(), plain)
    (check,) = session.stats.token_checks
    assert (check.checked, check.wrong) == (32 * microbatches, 0)


def test_autocast(device: torch.device) -> None:
    """Under autocast to bf16 a recorded step replays to the bit, and is not that without it."""
    model = build()

    def step() -> dict[str, torch.Tensor]:
        with torch.autocast(device.type, torch.bfloat16):
            return tiny.step(model)

    plain = step()
    with r3patch.record(model) as recording:
        tiny.assert_equal(step(), plain)
    with r3patch.replay(model, recording.routes, measure=True):
        tiny.assert_equal(step(), plain)


@RECOMPUTE
def test_a_side_stream(recompute: Any, device: torch.device, on_card: None) -> None:
    """Forward and backward on a busy stream of the user's, the session entered on another one."""
    model = build(**recompute)
    microbatches = [tiny.with_gaps(tiny.random_routes(model, seed)) for seed in (11, 12)]
    with r3patch.replay(model, microbatches, measure=True):
        want = tiny.step(model)
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize()
    with r3patch.replay(model, microbatches, measure=True):
        with torch.cuda.stream(stream):
            keep_busy()
            got = tiny.step(model)
        stream.synchronize()
    tiny.assert_equal(got, want)


def test_a_default_device_on_the_card(device: torch.device) -> None:
    """`torch.device("cuda")` as a context, or set as the default: rows stay on the host."""
    model = build()
    microbatches = [tiny.with_gaps(tiny.random_routes(model, 11))]
    with r3patch.replay(model, microbatches):
        want = tiny.step(model, (1,))
    data = batch(1)
    with torch.device(device), r3patch.replay(model) as session:
        session.feed(microbatches[0])
        model.zero_grad()
        loss = model(**data).mean()
        loss.backward()
    tiny.assert_equal({"loss 1": loss.detach()} | tiny.gradients(model), want)
