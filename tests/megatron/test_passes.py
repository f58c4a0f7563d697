"""Forward passes: routers take microbatches together, and what failed is rewound."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny import (
    FULL,
    TOKENS,
    Calls,
    assert_close,
    assert_maps,
    assert_untouched,
    batch,
    build,
    gradients,
    loss_of,
    random_routes,
)

import r3patch

pytestmark = [pytest.mark.megatron, pytest.mark.usefixtures("cpu")]


class StopHereError(Exception):
    """Raised in the middle of a pass."""


class Interrupt(BaseException):
    """As KeyboardInterrupt: module hooks with always_call do not run for it."""


def raising(error: type[BaseException]) -> Any:
    def hook(*_: object) -> None:
        raise error

    return hook


@pytest.mark.parametrize("error", [StopHereError, Interrupt])
@pytest.mark.parametrize("failing", range(3))
@pytest.mark.parametrize("recompute", [{}, FULL], ids=["no_recompute", "full"])
def test_a_failed_forward_is_rewound(failing: int, recompute: Any, error: Any) -> None:
    """Whichever microbatch fails, and wherever: its retry takes the same rows in every layer."""

    def run(fails: bool) -> tuple[Calls, dict[str, torch.Tensor]]:
        model = build(**recompute)
        microbatches = [random_routes(model, seed) for seed in (11, 12, 13)]
        calls = Calls(model)
        with r3patch.replay(model, microbatches):
            for index in range(3):
                if fails and index == failing:
                    router = r3patch.routers(model, "main")[-1].module
                    handle = router.register_forward_pre_hook(raising(error))
                    with pytest.raises(error):
                        loss_of(model, index)
                    handle.remove()
                    calls.clear()
                    loss_of(model, index).backward()
                    assert_maps(calls.main(in_backward=False), [microbatches[index]])
                else:
                    loss_of(model, index).backward()
        return calls, gradients(model)

    assert_close(run(True)[1], run(False)[1])


def test_a_failed_forward_behind_its_routers_is_rewound() -> None:
    """All of them have taken the microbatch when the head fails: they take it again."""
    model = build()
    calls = Calls(model)
    microbatches = [random_routes(model, seed) for seed in (11, 12)]
    with r3patch.replay(model, microbatches):
        handle = model.output_layer.register_forward_pre_hook(raising(StopHereError))
        with pytest.raises(StopHereError):
            loss_of(model, 1)
        handle.remove()
        calls.clear()
        loss_of(model, 1)
        loss_of(model, 2)
    assert_maps(calls.main(in_backward=False), microbatches)


def in_a_thread(run: Callable[[], Any]) -> None:
    """In one that is gone then."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


@pytest.mark.parametrize(
    ("error", "place"),
    [(StopHereError, in_a_thread), (Interrupt, in_a_thread), (Interrupt, lambda run: run())],
    ids=["raised", "left with its thread", "left"],
)
@pytest.mark.parametrize("kind", ["replay", "record"])
def test_of_several_chunks_the_one_that_failed_goes_on_first(
    kind: str, error: type[BaseException], place: Any
) -> None:
    """A retry from the first chunk would take the next microbatch there: refused at once."""
    chunks = [build(num_layers=2, moe_layer_freq=freq) for freq in ([1, 0], [0, 1])]
    calls = [Calls(chunk) for chunk in chunks]
    wanted = [[random_routes(chunk, seed) for seed in (11, 12)] for chunk in chunks]
    router = r3patch.routers(chunks[1], "main")[0].module
    opened: Any = r3patch.record(chunks) if kind == "record" else r3patch.replay(chunks, [])
    with opened as session:
        for number in range(2 * (kind == "replay")):
            for chunk, routes in zip(chunks, wanted, strict=True):
                session.feed(routes[number], chunk)
        loss_of(chunks[0], 1)
        handle = router.register_forward_pre_hook(raising(error))
        with pytest.raises(error):
            place(lambda: loss_of(chunks[1], 1))
        handle.remove()
        for _ in range(2):
            with pytest.raises(r3patch.ReplayError, match=r"of chunk 0 .* last one of chunk 1 "):
                loss_of(chunks[0], 1)
        calls[1].clear()
        loss_of(chunks[1], 1)
        loss_of(chunks[0], 2)
        loss_of(chunks[1], 2)
    if kind == "record":
        assert [routes.layers for routes in session.routes] == [(1, 2)] * 2
    else:
        for of_chunk, routes in zip(calls, wanted, strict=True):
            assert_maps(of_chunk.main(in_backward=False), routes)


def test_two_chunks_at_the_same_time() -> None:
    """Each in a thread of its own, one inside the other's pass: each takes its own rows."""
    chunks = [build(), build()]
    calls = [Calls(chunk) for chunk in chunks]
    routes = random_routes(chunks[0], 11)
    router = r3patch.routers(chunks[1], "main")[1].module
    router.register_forward_pre_hook(lambda *_: in_a_thread(lambda: loss_of(chunks[0], 1)))
    with r3patch.replay(chunks, [routes]):
        loss_of(chunks[1], 1)
    for of_chunk in calls:
        assert_maps(of_chunk.main(in_backward=False), [routes])


def test_an_inner_module_called_by_itself_is_refused_when_it_fails() -> None:
    """Where no pass of the chunk is seen, a retry of half a forward raises at its first router."""
    model = build()
    routers = r3patch.routers(model, "main")
    hidden = torch.zeros(12, 2, model.config.hidden_size)
    with r3patch.replay(model, [random_routes(model, 11)]):
        routers[0].module(hidden)
        with pytest.raises(r3patch.ReplayError, match="asks for the rows of microbatch 1, but"):
            routers[0].module(hidden)
        for info in routers[1:]:
            info.module(hidden)


def test_layers_called_one_by_one_take_their_rows() -> None:
    """Combined 1F1B calls layers, not the chunk: microbatch by microbatch that is exact."""
    model = build()
    microbatches = [random_routes(model, seed) for seed in (11, 12)]
    calls = Calls(model)
    hidden = torch.zeros(12, 2, model.config.hidden_size)
    with r3patch.replay(model, microbatches):
        for _ in microbatches:
            for info in r3patch.routers(model, "main"):
                info.module(hidden)
    assert_maps(calls.main(in_backward=False), microbatches)


def test_a_pass_that_leaves_a_router_out_is_refused_at_its_end() -> None:
    """Not at the end of the session, when all microbatches have gone wrong."""
    model = build()
    last = r3patch.routers(model, "main")[-1].module
    last.routing = lambda logits, *args, **kwargs: type(last).routing(
        _without_replay(last), logits, *args, **kwargs
    )
    with (
        pytest.raises(r3patch.ReplayError, match=r"a forward pass of chunk 0 .* has ended, and"),
        r3patch.replay(model, [random_routes(model, 11)]),
    ):
        loss_of(model, 1)
    assert_untouched(model)


def _without_replay(router: torch.nn.Module) -> Any:
    class Bare:
        def __getattr__(self, name: str) -> Any:
            return None if name == "router_replay" else getattr(router, name)

    return Bare()


def test_two_forwards_at_the_same_time_are_refused() -> None:
    """Which of the two takes which microbatch is not known."""
    model = build()
    inside, go_on = threading.Event(), threading.Event()
    first = r3patch.routers(model, "main")[0].module

    def wait(*_: object) -> None:
        inside.set()
        go_on.wait(60)

    with r3patch.replay(model, [random_routes(model, 11)]):
        handle = first.register_forward_pre_hook(wait)
        thread = threading.Thread(target=loss_of, args=(model, 1))
        thread.start()
        inside.wait(60)
        handle.remove()
        with pytest.raises(r3patch.ReplayError, match=r"two threads .* at the same time"):
            loss_of(model, 2)
        go_on.set()
        thread.join()


def test_a_thread_that_died_in_a_pass_gives_its_rows_back() -> None:
    """An exception that runs no hook, in a thread that is gone: the next pass takes the rows."""
    model = build()
    calls = Calls(model)
    routes = random_routes(model, 11)
    router = r3patch.routers(model, "main")[-1].module

    def die() -> None:
        with pytest.raises(Interrupt):
            loss_of(model, 1)

    with r3patch.replay(model, [routes]):
        handle = router.register_forward_pre_hook(raising(Interrupt))
        thread = threading.Thread(target=die)
        thread.start()
        thread.join()
        handle.remove()
        calls.clear()
        loss_of(model, 1)
    assert_maps(calls.main(in_backward=False), [routes])


class PerSequence(torch.nn.Module):
    """An engine-like forward: the model runs once per sequence, in one forward pass."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, lengths: tuple[int, ...]) -> list[torch.Tensor]:
        whole = batch(1)
        return [
            self.model(
                input_ids=whole["input_ids"][:1, :n],
                position_ids=whole["position_ids"][:1, :n],
                attention_mask=whole["attention_mask"][..., :n, :n],
                labels=whole["labels"][:1, :n],
            )
            for n in lengths
        ]


def test_calls_of_one_pass_are_one_recorded_microbatch() -> None:
    """A router that is called per packed sequence gives one microbatch, its rows in order."""
    model = PerSequence(build())
    calls = Calls(model)
    with r3patch.record(model) as recording:
        model((4, 8))
        model((5, 7))
    assert [routes.num_tokens for routes in recording.routes] == [12, 12]
    maps = calls.main(in_backward=False)
    for layer in recording.routes[0].layers:
        column = torch.cat([routes.select([layer]).experts for routes in recording.routes])
        got = torch.zeros(24, 16, dtype=torch.bool).scatter(1, column[:, 0].long(), True)
        assert torch.equal(got, torch.cat(maps[layer]))


def test_a_second_microbatch_in_one_pass_is_refused() -> None:
    """Replay takes one microbatch per pass: which module's passes count is said."""
    model = PerSequence(build())
    routes = [random_routes(model, seed, num_tokens=6) for seed in (1, 2)]
    with (
        pytest.raises(r3patch.ReplayError, match="asks for a second microbatch"),
        r3patch.replay(model, routes),
    ):
        model((6, 6))


@pytest.mark.parametrize("error", [StopHereError, Interrupt])
def test_a_failed_pass_records_nothing(error: Any) -> None:
    """The half of a forward that failed is not a microbatch, nor a part of the next one."""
    model = build()
    router = r3patch.routers(model, "main")[-1].module
    with r3patch.record(model) as recording:
        loss_of(model, 1)
        handle = router.register_forward_pre_hook(raising(error))
        with pytest.raises(error):
            loss_of(model, 2)
        handle.remove()
        loss_of(model, 2)
    with r3patch.record(model) as again:
        loss_of(model, 1)
        loss_of(model, 2)
    assert recording.routes == again.routes
    assert [routes.num_tokens for routes in again.routes] == [TOKENS, TOKENS]


def twice(model: Any) -> None:
    with torch.no_grad():
        loss_of(model, 1)
    loss_of(model, 1).backward()


def test_a_recompute_by_hand_is_told_what_it_looks_like() -> None:
    """Outside of autograd a second run of the forward is one more pass."""
    model = build()
    with (
        pytest.raises(r3patch.ReplayError, match="A recompute by hand, outside of autograd"),
        r3patch.replay(model, [random_routes(model, 11)]),
    ):
        twice(model)


def test_a_forward_inside_backward_is_not_left_out_of_a_recording() -> None:
    """Of a hook: it would be recorded nowhere, so it is refused."""
    model = build()

    def run() -> None:
        with r3patch.record(model):
            loss = loss_of(model, 1)
            loss.register_hook(lambda _: loss_of(model, 2) * 0)
            loss.backward()

    with pytest.raises(r3patch.ReplayError, match="a call inside backward repeats no checkpointed"):
        run()
