"""Claims that mutants of the sessions outlived: each test here kills one (tools/mutants.py)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import (
    EXPERTS,
    TOKENS,
    Calls,
    assert_close,
    assert_maps,
    batch,
    build,
    gradients,
    loss_of,
    random_routes,
)
from torch.utils.checkpoint import checkpoint

import r3patch
from r3patch import Routes
from r3patch.rows.spread import spread_rows
from r3patch.sessions._microbatch import Microbatch

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("cpu")]


class StopHereError(Exception):
    """Raised in the middle of a pass."""


def stop(*_: object) -> None:
    raise StopHereError


def test_a_pass_that_failed_in_a_thread_that_lives_on() -> None:
    """It is over when it fails: another thread's retry is not "at the same time"."""
    model = build()
    calls = Calls(model)
    routes = random_routes(model, 11)
    router = r3patch.routers(model, "main")[-1].module
    with ThreadPoolExecutor(1) as pool, r3patch.replay(model, [routes]):
        handle = router.register_forward_pre_hook(stop)
        with pytest.raises(StopHereError):
            pool.submit(loss_of, model, 1).result()
        handle.remove()
        calls.clear()
        loss_of(model, 1)
    assert_maps(calls.main(in_backward=False), [routes])


def test_a_pass_that_left_a_router_out_is_rewound_as_well() -> None:
    """Who catches that error and mends the router may run the microbatch again."""
    model = build()
    calls = Calls(model)
    routes = random_routes(model, 11)
    last = r3patch.routers(model, "main")[-1].module
    with r3patch.replay(model, [routes]):
        tap, last.router_replay = last.router_replay, None
        with pytest.raises(r3patch.ReplayError, match="has ended, and"):
            loss_of(model, 1)
        last.router_replay = tap
        calls.clear()
        loss_of(model, 1)
    assert_maps(calls.main(in_backward=False), [routes])


def test_the_recompute_of_a_whole_chunk_is_no_pass_of_it() -> None:
    """In autograd's own thread, which lives on, it would stand in the way of the next forward."""
    model = build()
    microbatches = [random_routes(model, seed) for seed in (11, 12)]
    hook = torch.zeros((), requires_grad=True)
    done, leave = threading.Event(), threading.Event()

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        done.set()
        leave.wait(60)

    with r3patch.replay(model, microbatches):
        loss = checkpoint(lambda _: loss_of(model, 1), hook, use_reentrant=True)
        worker = threading.Thread(target=backward, args=(loss,))
        worker.start()
        done.wait(60)
        loss_of(model, 2).backward()
        leave.set()
        worker.join()
    plain: Any = build()
    with r3patch.replay(plain, microbatches):
        for seed in (1, 2):
            loss_of(plain, seed).backward()
    assert_close(gradients(model), gradients(plain))


def with_tokens(model: Any, seed: int, tokens: torch.Tensor) -> Routes:
    routes = random_routes(model, seed)
    return Routes(routes.experts, routes.layers, num_experts=EXPERTS, tokens=tokens)


def test_a_session_leaves_no_entry_of_a_hook() -> None:
    """Neither the hooks nor torch's notes of which are called always, or with keywords."""
    model = build()
    tokens = batch(1)["input_ids"].t().flatten()
    with r3patch.replay(model, [with_tokens(model, 11, tokens)]):
        loss_of(model, 1)
    for module in (model, model.embedding):
        assert not module._forward_pre_hooks
        assert not module._forward_pre_hooks_with_kwargs
        assert not module._forward_hooks
        assert not module._forward_hooks_always_called


def test_token_0_is_a_token() -> None:
    """A row of token 0 that the model gets for another token is a fault as any other."""
    model = build()
    tokens = batch(1)["input_ids"].t().flatten().clone()
    tokens[int(tokens.argmax())] = 0
    with (
        pytest.raises(r3patch.ReplayError, match="token"),
        r3patch.replay(model, [with_tokens(model, 11, tokens)]),
    ):
        loss_of(model, 1)


def test_rows_of_mtp_are_counted_as_live() -> None:
    """Row by row, as those of main routers: a call of 24 tokens is 24."""
    model = build()
    with r3patch.replay(model, [random_routes(model, 11)]) as session:
        loss_of(model, 1)
    mtp = session.stats.total("mtp")
    assert (mtp.forward_calls, mtp.rows_live, mtp.rows_replayed) == (1, TOKENS, 0)


def test_each_chunk_is_fed_its_own() -> None:
    """feed(chunk=) reaches that chunk, in whatever order the chunks run."""
    first, second = build(), build()
    calls = Calls(first), Calls(second)
    routes = random_routes(first, 11), random_routes(second, 12)
    with r3patch.replay([first, second], []) as session:
        session.feed(routes[1], second)
        session.feed(routes[0], first)
        loss_of(first, 1)
        loss_of(second, 1)
    for of_chunk, given in zip(calls, routes, strict=True):
        assert_maps(of_chunk.main(in_backward=False), [given])


def test_a_recompute_of_fewer_rows_is_refused() -> None:
    """A region that runs another piece of the tokens when it is repeated gets no rows."""
    model = build()
    hidden = torch.randn(12, 2, model.config.hidden_size, requires_grad=True)
    routers = [info.module for info in r3patch.routers(model, "main")]
    length = 12
    with r3patch.replay(model, [random_routes(model, 11)]):
        first = checkpoint(lambda x: routers[0](x[:length])[0].sum(), hidden, use_reentrant=True)
        for router in routers[1:]:
            router(hidden)
        length = 10
        with pytest.raises(r3patch.ReplayError, match="recompute asks for 20 rows, its forward"):
            first.backward()


def test_routers_called_by_themselves_are_microbatches_of_their_own() -> None:
    """Where no pass of the chunk is seen, every call of a router is recorded as one microbatch."""
    model = build()
    with r3patch.record(model) as recording:
        handle = model.output_layer.register_forward_pre_hook(stop)
        with pytest.raises(StopHereError):
            loss_of(model, 1)
        handle.remove()  # the pass is over, and these calls are no part of it
        for length in (12, 6):
            for info in r3patch.routers(model, "main"):
                info.module(torch.zeros(length, 2, model.config.hidden_size))
    assert [routes.num_tokens for routes in recording.routes] == [24, 12]


def test_a_recording_has_its_layers_in_order() -> None:
    """Whatever the order in which the chunks are listed."""
    first, second = (build(num_layers=2, moe_layer_freq=freq) for freq in ([1, 0], [0, 1]))
    with r3patch.record([second, first]) as recording:
        loss_of(first, 1)
        loss_of(second, 1)
    assert [routes.layers for routes in recording.routes] == [(1, 2)]


@pytest.mark.feature("config:mlp_chunks_for_training")
def test_a_chunked_router_called_by_itself_is_not_recorded() -> None:
    """Which calls are one microbatch is not known then."""
    model = build(mlp_chunks_for_training=3)
    router = r3patch.routers(model, "main")[0].module
    with r3patch.record(model):
        with pytest.raises(r3patch.ReplayError, match="which calls are one"):
            router(torch.zeros(12, 2, model.config.hidden_size))
        loss_of(model, 1)


def test_spread_rows_go_round_the_ranks_and_the_experts_of_their_layer() -> None:
    """With two expert-parallel ranks, and a pruned layer that has half of the experts."""
    routes = Routes.missing(6, (1, 2), 2, 16)
    routers: list[Any] = [
        SimpleNamespace(name="", layer_number=n, topk=2, num_experts=e)
        for n, e in ((1, 16), (2, 8))
    ]
    microbatch = Microbatch(routes, routers, missing="spread", ep_size=2)
    first, second = microbatch.to_device(torch.device("cpu")).ids
    assert torch.equal(first.long(), spread_rows(6, 2, 16, ep_size=2))
    assert torch.equal(second.long(), spread_rows(6, 2, 8, first=6, ep_size=2))


class Wrapper(torch.nn.Module):
    """As DDP and Float16Module hold a model."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


def test_a_pass_of_the_model_in_two_wrappers_is_seen() -> None:
    """A session on the outer one rewinds a failed pass of the model itself."""
    model = build()
    calls = Calls(model)
    routes = random_routes(model, 11)
    router = r3patch.routers(model, "main")[-1].module
    with r3patch.replay(Wrapper(Wrapper(model)), [routes]):
        handle = router.register_forward_pre_hook(stop)
        with pytest.raises(StopHereError):
            loss_of(model, 1)
        handle.remove()
        calls.clear()
        loss_of(model, 1)
    assert_maps(calls.main(in_backward=False), [routes])
