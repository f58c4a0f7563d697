"""What a second reader found: figures of padding, rows on the device, calls without tokens."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import EXPERTS, FULL, TOKENS, batch, build, loss_of, random_routes

import r3patch
from r3patch import Routes, testing
from r3patch.observe import trace
from r3patch.sessions._microbatch import Microbatch, check_size

pytestmark = pytest.mark.megatron


@pytest.fixture(scope="module", autouse=True)
def cpu() -> Iterator[None]:
    with testing.megatron_on_cpu():
        yield


def test_spread_rows_are_not_measured() -> None:
    """Experts that r3patch gave to padding say nothing of the rollout: no figure counts them."""
    model = build()
    with r3patch.record(model) as recording:
        loss_of(model, 1)
    (own,) = recording.routes
    valid = torch.arange(TOKENS) < TOKENS // 4
    routes = Routes(own.experts, own.layers, valid, num_experts=EXPERTS)
    with r3patch.replay(model, [routes], missing="spread", measure=True) as session:
        loss_of(model, 1)
    total = session.stats.total("main")
    assert total.rows_measured == total.rows_replayed == len(own.layers) * TOKENS // 4
    assert (total.rows_differing, total.overlap) == (0, 1)
    assert list(session.stats.tokens) == valid.int().tolist()


def test_tokens_do_not_keep_rows_on_the_device() -> None:
    """Rows with tokens are of the two latest microbatches too, and gone after the session."""
    model = build(**FULL)
    microbatches = []
    for seed in range(4):
        routes, ids = random_routes(model, seed), batch(seed)["input_ids"]
        microbatches.append(
            Routes(routes.experts, routes.layers, num_experts=EXPERTS, tokens=ids.t().reshape(-1))
        )
    with r3patch.replay(model, microbatches) as session:
        losses = [loss_of(model, seed) for seed in range(4)]
        assert on_device() == 2
        torch.stack(losses).sum().backward(retain_graph=True)
    assert on_device() == 0  # while somebody keeps the graph and the session
    assert session.stats.total("main").recompute_calls == 4 * len(microbatches[0].layers)


def on_device() -> int:
    """How many microbatches have rows on the device."""
    return sum(type(o) is Microbatch and o.on_device is not None for o in gc.get_objects())


@pytest.mark.parametrize(("total", "num_tokens"), [(0, 8), (8, 0)])
def test_an_empty_side_is_a_wrong_size(total: int, num_tokens: int) -> None:
    """A call or a microbatch of no tokens is refused by name, not by a division by zero."""
    with pytest.raises(r3patch.ReplayError, match=f"routes {num_tokens} tokens, .* has {total} "):
        check_size(total, 0, num_tokens, 1, "decoder.router")


@pytest.mark.parametrize("num_tokens", [6, 8])
def test_a_piece_of_another_size_than_the_one_before_is_refused(num_tokens: int) -> None:
    """Twelve tokens in three pieces of a chunked MLP are four each, or six, six, or all."""
    check_size(12, 4, 4, 3, "decoder.router")
    with pytest.raises(r3patch.ReplayError, match=f"routes {num_tokens} tokens, .* 8 rows left"):
        check_size(12, 4, num_tokens, 3, "decoder.router")


def test_a_microbatch_of_no_tokens() -> None:
    """A rank that gets no token of a microbatch takes its empty rows, in order."""
    model = build()
    with r3patch.replay(model, [random_routes(model, 1, num_tokens=n) for n in (2, 0, 2)]) as s:
        for size in (1, 0, 1):
            for tap in s._taps[:2]:
                scores = torch.rand(2 * size, EXPERTS)
                tap.get_replay_topk(scores, 4, default_compute_topk=torch.topk)
    assert s.stats.total("main").rows_replayed == 8


def test_an_mtp_router_without_the_extension_point() -> None:
    """A head's own kind of router, which no session could reach, is left alone."""
    from megatron.core.transformer.moe.router import Router

    class OwnRouter(Router):  # type: ignore[misc]  # Megatron carries no types
        def __init__(self, config: Any) -> None:
            torch.nn.Module.__init__(self)
            self.config = config

        def routing(self, logits: torch.Tensor) -> torch.Tensor:
            return logits

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    model = build()
    model.head = OwnRouter(model.config)
    r3patch.label(model.head, scope="mtp")
    with r3patch.record(model) as recording:
        loss_of(model, 1)
    assert len(recording.routes) == 1
    assert not hasattr(model.head, "router_replay")


@pytest.mark.parametrize("open_session", [r3patch.record, r3patch.replay])
def test_a_session_that_is_closed_and_was_never_opened(open_session: Any) -> None:
    """A framework whose hook for open() is not called has run live: close() says so."""
    session = open_session(build())
    with pytest.raises(r3patch.ReplayError, match="was never entered"):
        session.close()
    error = ValueError("the step's own")
    open_session(build()).close(error)  # hides no other error


def test_a_second_close_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    """close() inside the block, or twice: the session is checked and traced once."""
    written: list[Any] = []
    monkeypatch.setattr(trace, "enabled", lambda: True)
    monkeypatch.setattr(trace, "write", written.append)
    model = build()
    with r3patch.replay(model, [random_routes(model, 1)]) as session:
        loss_of(model, 1)
        session.close()
    session.close()
    assert len(written) == 1


def test_a_recording_of_two_models_is_refused() -> None:
    """Their layers have the same numbers, and the second's columns would replace the first's."""
    recording = r3patch.record([build(), build()])
    with pytest.raises(r3patch.ReplayError, match=r"layer 2 is in chunk 0 .* and in chunk 1"):
        recording.open()


def test_a_failed_forward_that_no_hook_sees_leaves_no_ids() -> None:
    """model.forward(...) runs no hooks: ids that met no router are not the next microbatch's."""
    model = build()
    microbatches = []
    for seed in (1, 2):
        routes, ids = random_routes(model, seed), batch(seed)["input_ids"]
        microbatches.append(
            Routes(routes.experts, routes.layers, num_experts=EXPERTS, tokens=ids.t().reshape(-1))
        )

    def fail(*_: object) -> None:
        raise ValueError

    with r3patch.replay(model, microbatches) as session:
        handle = r3patch.routers(model, "main")[0].module.register_forward_pre_hook(fail)
        with pytest.raises(ValueError):
            model.forward(**batch(1))
        handle.remove()
        for seed in (1, 2):
            model.forward(**batch(seed))
    assert session.stats.token_checks[0].checked == 2 * TOKENS


class SetupContext(torch.autograd.Function):
    """A checkpoint in the newer style: its forward does not get the node."""

    @staticmethod
    def forward(x: torch.Tensor, run: Any) -> Any:
        return run(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.x, ctx.run = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        with torch.enable_grad():
            result = ctx.run(ctx.x.detach().requires_grad_())
        torch.autograd.backward(result, gradients)
        return gradients[0], None


def test_a_checkpoint_that_hides_its_node_is_told_what_to_change() -> None:
    """A Function with setup_context cannot be matched: refused, and the way out is named."""
    model, start = build(), torch.zeros((), requires_grad=True)
    with (
        pytest.raises(r3patch.ReplayError, match=r"has to run its region .* in `forward\(ctx"),
        r3patch.replay(model, [random_routes(model, 1)]),
    ):
        SetupContext.apply(start, lambda _: loss_of(model, 1)).backward()  # type: ignore[no-untyped-call]
