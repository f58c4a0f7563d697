"""Random checkpoints x schedules x gaps x faults, each against the same microbatches run plainly.

    python benchmarks/stress.py --seconds 3600 --seed 0
    python benchmarks/stress.py --case 1234            # one of them again
    python benchmarks/stress.py --case '{"seed": ...}' # or a case as it was printed

What is wanted is computed without r3patch: an extension point of this file's own forces the rows,
without checkpoints, threads or faults, microbatch by microbatch. What is got is what hooks of this
file's own see: every routing map, in forward and in recompute, and the gradients of each backward.
A case is one of

    exact    every map and gradient is the plain run's
    wrong    some are not, and nothing was raised before the gradients were there
    refused  an R3PatchError
    broken   another exception
    void     stock Megatron without r3patch fails or deviates under the same schedule, too

The exit status is 1 if a case was wrong or broken, or was refused without a fault or a thread.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from schedules import GPT, LAYERS, Case, Move, draw, simpler
from stack import (
    CHECKPOINTS,
    ROUTINGS,
    Forced,
    Nest,
    Stack,
    expect_foreign_routes,
    leaves,
    random_routes,
)

import r3patch
from r3patch import Routes, testing

BATCH, LENGTH, EXPERTS, TOPK, VOCABULARY = 2, 14, 16, 4, 64
TOKENS = BATCH * LENGTH  # with all layers, and 10 % gaps, enough for the alarm
Gradients = dict[str, torch.Tensor]
Replay = Callable[..., contextlib.AbstractContextManager[Any]]


class InjectedError(Exception):
    """The fault of a case: out of memory, a lost peer, a user's Ctrl-C."""


@dataclass
class Outcome:
    kind: str  # see the head of this file
    text: str = ""
    move: int = -1  # at which it was decided


# Two kinds of model, one way to run them.


class Embedded(Stack):
    """A stack with an embedding, as a first pipeline chunk: ``[b, s] -> [s, b, hidden]``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weights = torch.randn(
            VOCABULARY, self.config.hidden_size, generator=torch.Generator().manual_seed(0)
        )
        self.embedding = torch.nn.Embedding.from_pretrained(weights, freeze=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(self.embedding(ids).transpose(0, 1).contiguous())


class Model:
    """The chunks of a model with what the harness needs of them: a loss, and the main routers."""

    def __init__(self, routing: str, gpt: str | None, split: int) -> None:
        self.routing, self.split = routing, split
        self.chunks: list[torch.nn.Module]
        if gpt is not None:
            self.chunks = [_gpt(routing, GPT[gpt])]
        elif not split:
            self.chunks = [Embedded(routing, LAYERS)]
        else:
            rest = Stack(routing, LAYERS - split, first=split + 1, total=LAYERS)
            self.chunks = [Embedded(routing, split, total=LAYERS), rest]
        infos = r3patch.routers(self.chunks, "main")
        self.routers = [info.module for info in infos]
        self.layers = tuple(router.layer_number for router in self.routers)

    @property
    def given(self) -> Any:
        """What a session is opened on."""
        return self.chunks if self.split else self.chunks[0]

    def arrange(self, nest: tuple[Nest, ...]) -> None:
        """Put checkpoints around the layers; the first part of the nest is the first chunk's."""
        first, *others = self.chunks
        assert isinstance(first, Stack)
        first.nest = nest[:1] if others else nest
        for other in others:
            assert isinstance(other, Stack)
            other.nest = tuple(_moved(part, self.split) for part in nest[1:])

    def loss(self, seed: int, outer: str = "", tail: int | None = None) -> torch.Tensor:
        """The loss of the microbatch of a seed."""
        one = torch.ones((), requires_grad=True)  # a reentrant checkpoint wants such an input
        if not isinstance(self.chunks[0], Stack):
            batch = _batch(seed)
            out = self._call(lambda x: self.chunks[0](**batch) * x, one, outer)
            return out.float().mean()
        ids, target = _tensors(seed, self.chunks[0].config.hidden_size)

        def forward(x: torch.Tensor) -> torch.Tensor:
            return functools.reduce(lambda y, chunk: chunk(y), self.chunks, ids) * x

        out = self._call(forward, one, outer)
        hidden = [part for chunk in self.chunks for part in _take_hidden(chunk)]
        return ((out if tail is None else hidden[tail]) * target).mean()

    @staticmethod
    def _call(model: Callable[..., torch.Tensor], x: torch.Tensor, outer: str) -> torch.Tensor:
        return CHECKPOINTS[outer](model, x) if outer else model(x)

    def take_gradients(self) -> Gradients:
        """The gradients since the last call, which are gone then."""
        named = {
            f"{index}.{name}": parameter
            for index, chunk in enumerate(self.chunks)
            for name, parameter in chunk.named_parameters()
        }
        found = {name: p.grad for name, p in named.items() if p.grad is not None}
        for parameter in named.values():
            parameter.grad = None
        return found


def _take_hidden(chunk: Any) -> list[torch.Tensor]:
    hidden, chunk.hidden = chunk.hidden, []
    return hidden  # type: ignore[no-any-return]


def _moved(part: Nest, by: int) -> Nest:
    """The same nest, its layers counted from another one on."""
    if isinstance(part, int):
        return part - by
    return part[0], tuple(_moved(inner, by) for inner in part[1])


@functools.lru_cache(64)  # made before the run: not inside somebody's selective context
def _tensors(seed: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[b, s]``, and what the output is multiplied with."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    return ids, torch.randn(LENGTH, BATCH, hidden, generator=generator)


@functools.lru_cache(64)
def _batch(seed: int) -> dict[str, Any]:
    (batch,) = testing.random_batches(
        num_microbatches=1, micro_batch_size=BATCH, seq_length=LENGTH, seed=seed
    )
    return batch


def _gpt(routing: str, recompute: dict[str, Any]) -> torch.nn.Module:
    fields = {
        "num_layers": LAYERS,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK,
        "moe_layer_freq": [1] * LAYERS,
        "multi_latent_attention": False,
        **ROUTINGS[routing],
        **recompute,
    }
    (model,) = testing.tiny_model(**fields)
    testing.seed_parameters(model)
    return model.train()


@functools.cache
def _plain(routing: str, split: int, *, gpt: bool) -> Model:
    return Model(routing, "plain" if gpt else None, split)


@functools.cache
def _model(routing: str, gpt: str | None, split: int) -> Model:
    return Model(routing, gpt, split)  # with the weights of the plain one


def _model_of(case: Case) -> Model:
    return _model(case.routing, case.nest if isinstance(case.nest, str) else None, case.split)


# What is given.


def rollout(case: Case, number: int) -> Routes:
    """The routes of a microbatch, as an engine's: columns in any order, gaps, tokens."""
    layers, seed = range(1, LAYERS + 1), _seed(case, number)
    draw_rows = functools.partial(
        random_routes, layers, TOKENS, experts=EXPERTS, topk=TOPK, seed=seed
    )
    ids, valid = draw_rows().experts, draw_rows(gaps=case.gaps).mask
    if case.healthy:  # the model's own, but for one token
        maps = wanted(case, number, None).maps
        own = [each.nonzero()[:, 1].view(TOKENS, TOPK) for each in maps]
        ids = torch.cat([ids[:1], torch.stack(own, 1)[1:].flip(2)])
    if case.ragged:
        valid = torch.stack([valid[:, i].roll(i) for i in range(LAYERS)], 1)
    tokens = None
    if case.tokens:
        stack = not isinstance(case.nest, str)
        embedded = _tensors(seed, 1)[0] if stack else _batch(seed)["input_ids"]
        tokens = embedded.t().flatten()
    return Routes(ids, layers, valid, num_experts=EXPERTS, tokens=tokens)


def forced(case: Case, rows: Routes) -> Routes:
    """The rows that the routers must take: those without routes filled, where the case wants so."""
    if case.missing == "live":
        return rows
    ids = rows.experts.long()
    for column in range(LAYERS):
        missing = (~rows.mask[:, column]).nonzero()[:, 0]
        # Whole rows in turn, from where the layer before in the same chunk would have ended.
        in_chunk = column - case.split if case.split and column >= case.split else column
        first = in_chunk * len(missing) * TOPK
        fill = torch.arange(first, first + len(missing) * TOPK) % EXPERTS
        ids[missing, column] = fill.view(-1, TOPK)
    return Routes(ids, rows.layers, num_experts=EXPERTS)


# What is wanted.


@dataclass
class Wanted:
    maps: list[torch.Tensor]  # by router
    gradients: Gradients
    near_tie: bool


def wanted(case: Case, number: int, rows: Routes | None) -> Wanted:
    """Maps and gradients of one microbatch, run plainly. Without rows: routed live."""
    model = _plain(case.routing, case.split, gpt=isinstance(case.nest, str))
    runs = [m for m in case.moves if (m.kind, m.microbatch) == ("f", number) and not m.place]
    tail = runs[0].tail if runs else None
    if tail is not None and not isinstance(case.nest, str):
        tail = len(list(leaves(case.nest[: tail + 1]))) - 1
    taps = [Forced(rows, layer) for layer in model.layers]
    maps: list[torch.Tensor] = []
    with contextlib.ExitStack() as undo:
        for router, tap in zip(model.routers, taps, strict=True):
            undo.callback(setattr, router, "router_replay", router.router_replay)
            router.router_replay = tap
            hook = router.register_forward_hook(lambda m, a, out: maps.append(out[1].clone()))
            undo.callback(hook.remove)
        model.loss(_seed(case, number), tail=tail).backward()
    return Wanted(maps, model.take_gradients(), min(tap.margin for tap in taps) < 2e-6)


def _seed(case: Case, number: int) -> int:
    return case.seed * 16 + number


# What is got.


class DecidedError(Exception):
    """Leave the session now: the case is decided."""


class Run:
    """One case on one model: its moves, and hooks that see what the routers really do."""

    def __init__(self, case: Case, rows: list[Routes], want: list[Wanted], session: Any) -> None:
        self.case, self.rows, self.want, self.session = case, rows, want, session
        self.model = _model_of(case)
        self.losses: dict[int, torch.Tensor] = {}
        self.fed: set[int] = set()
        self.current: dict[int, int] = {}  # by thread: the microbatch of its move
        self.armed: tuple[int, str] | None = None
        self.action: Callable[[], None] = lambda: None
        self.seen: list[str] = []  # what was not as wanted in the present move
        self.pool: dict[int, ThreadPoolExecutor] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with contextlib.ExitStack() as undo:
            for index, router in enumerate(self.model.routers):
                before = router.register_forward_pre_hook(functools.partial(self._before, index))
                after = router.register_forward_hook(functools.partial(self._after, index))
                undo.callback(before.remove)
                undo.callback(after.remove)
            undo.callback(self._end_threads)
            undo.callback(self.model.take_gradients)
            yield

    def _end_threads(self) -> None:
        for pool in self.pool.values():
            pool.shutdown()

    def _before(self, index: int, module: Any, args: Any) -> None:
        self._trip(index, "b")

    def _after(self, index: int, module: Any, args: Any, output: Any) -> None:
        probs, routing_map = output
        number = self.current[threading.get_ident()]
        wrong = 0
        if number >= 0:
            wrong = int((routing_map != self.want[number].maps[index]).any(dim=1).sum())
        if wrong:
            where = "recompute" if torch._C._current_graph_task_id() != -1 else "forward"
            self.seen.append(f"{wrong} of {TOKENS} rows of router {index} in {where}")
        if probs.requires_grad:
            probs.register_hook(lambda gradient: self._trip(index, "g"))
        self._trip(index, "a")

    def _trip(self, index: int, place: str) -> None:
        if self.armed == (index, place):
            self.armed = None
            self.action()

    def do(self, move: Move) -> None:
        """A move, where the case wants it: here, or in a thread."""
        number, style = move.microbatch, self.case.threads
        if not style:
            self._do(move)
            return
        pool = self.pool.get(number) if style == "microbatch" else None
        pool = pool or ThreadPoolExecutor(1)
        self.pool[number] = pool
        pool.submit(self._do, move).result()
        if style == "move":
            pool.shutdown()

    def _do(self, move: Move) -> None:
        number, this_thread = move.microbatch, threading.get_ident()
        self.current[this_thread] = number
        self.armed = (move.layer, move.place) if move.place else None
        self.action = (
            self._fail
            if move.evaluate is None
            else functools.partial(self._evaluate, move.evaluate)
        )
        try:
            if move.kind == "f":
                self.losses[number] = self._forward(number, move.tail)
            elif move.kind == "e":
                self._evaluate(number)
            elif move.kind == "x":
                del self.losses[number]
            else:
                self._backward(move)
                if self.armed and move.evaluate is not None:  # no recompute came by there
                    self.armed = None
                    self._evaluate(move.evaluate)
        finally:
            self.armed = None

    def _fail(self) -> None:
        raise InjectedError

    def _forward(self, number: int, tail: int | None = None) -> torch.Tensor:
        if self.case.feed and number not in self.fed:
            self.fed.add(number)
            for chunk in self.model.chunks:
                self.session.feed(self.rows[number], chunk)
        return self.model.loss(_seed(self.case, number), self.case.outer, tail)

    def _evaluate(self, number: int) -> None:
        this_thread = threading.get_ident()
        around = self.current[this_thread]
        self.current[this_thread] = number
        with torch.no_grad():
            self._forward(number)
        self.current[this_thread] = around

    def _backward(self, move: Move) -> None:
        numbers = [move.microbatch] + ([move.other] if move.joint else [])
        losses = [self.losses[n] if move.kind == "B" else self.losses.pop(n) for n in numbers]
        try:
            if move.joint == "|":
                self._at_once(numbers, losses)
            elif move.joint:
                # Whose recompute runs when is autograd's choice: the maps cannot be told apart.
                self.current[threading.get_ident()] = -1
                sum(losses).backward()  # type: ignore[union-attr]
            else:
                losses[0].backward(retain_graph=move.kind == "B")
        finally:
            got = self.model.take_gradients()
        self._compare(got, numbers)

    def _at_once(self, numbers: list[int], losses: list[torch.Tensor]) -> None:
        start = threading.Barrier(len(numbers))

        def backward(number: int, loss: torch.Tensor) -> None:
            self.current[threading.get_ident()] = number
            start.wait()
            loss.backward()

        with ThreadPoolExecutor(len(numbers)) as pool:
            running = [
                pool.submit(backward, n, loss) for n, loss in zip(numbers, losses, strict=True)
            ]
            for each in running:
                each.result()

    def _compare(self, got: Gradients, numbers: list[int]) -> None:
        names = set(got).union(*(self.want[n].gradients for n in numbers))
        far = 0.0
        for name in names:
            want = sum(self.want[n].gradients.get(name, torch.zeros(())) for n in numbers)
            difference = got.get(name, torch.zeros(())) - want
            far = max(far, float(difference.norm() / (torch.as_tensor(want).norm() + 1e-6)))
        if far > 1e-3:
            self.seen.append(f"gradients, by {far:.2g} of their norm")


def judge(case: Case, replay: Replay = r3patch.replay) -> Outcome:
    """Run a case and say what became of it.

    Args:
        case: the case.
        replay: what is tested, called as `r3patch.replay` is.
    """
    rows = [rollout(case, number) for number in range(case.microbatches)]
    want = [wanted(case, number, forced(case, each)) for number, each in enumerate(rows)]
    if any(microbatch.near_tie for microbatch in want):
        return Outcome("void", "a near-tie of the model's own choice")
    outcome = _run(case, rows, want, replay)
    if outcome.kind in ("wrong", "broken"):
        live = [wanted(case, number, None) for number in range(case.microbatches)]
        # Two backwards at once race for what Megatron's dispatchers keep: not each run shows it.
        for _ in range(8 if "|" in case.schedule else 1):
            stock = _run(case, rows, live, _no_replay)
            if stock.kind != "exact" and stock.move <= outcome.move:
                return Outcome("void", f"so without r3patch: {stock.kind}, {stock.text}")
    return outcome


class _NoReplay:
    def feed(self, routes: Routes, chunk: Any) -> None: ...


def _no_replay(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[_NoReplay]:
    return contextlib.nullcontext(_NoReplay())


def _run(case: Case, rows: list[Routes], want: list[Wanted], replay: Replay) -> Outcome:
    model = _model_of(case)
    if not isinstance(case.nest, str):
        model.arrange(case.nest)
    taps = [router.router_replay for router in model.routers]
    word, outcome, number = "on entry", Outcome("exact"), -1
    try:
        given = [] if case.feed else rows
        with replay(model.given, given, **case.options) as session:
            run = Run(case, rows, want, session)
            with run.watching():
                for number, (word, move) in enumerate(
                    zip(case.schedule.split(), case.moves, strict=True)
                ):
                    run.seen = []
                    with contextlib.suppress(InjectedError):
                        run.do(move)
                    if run.seen:
                        outcome = Outcome("wrong", f"{word}: {'; '.join(run.seen)}", number)
                        raise DecidedError
            word, number = "on leaving", number + 1
    except DecidedError:
        pass
    except r3patch.R3PatchError as error:
        outcome = Outcome("refused", f"{word}: {type(error).__name__}: {error}", number)
    except Exception as error:  # noqa: BLE001 - whatever comes is what is looked for
        text = f"{type(error).__name__}: {error}".replace("\n", " ")
        outcome = Outcome("broken", f"{word}: {text}", number)
    if any(r.router_replay is not tap for r, tap in zip(model.routers, taps, strict=True)):
        return Outcome("wrong", "routers are not as they were before the session", number)
    return outcome


# Running many.


def shrink(case: Case, kind: str) -> Case:
    """The smallest case found by leaving things out that still ends in the same kind."""
    while True:
        for smaller in simpler(case):
            with contextlib.suppress(KeyError, IndexError):  # a schedule that makes no sense
                if judge(smaller).kind == kind:
                    case = smaller
                    break
        else:
            return case


def bad(case: Case, outcome: Outcome) -> bool:
    """Whether this is a defect: silence, a foreign exception, or a refusal of a plain run."""
    return outcome.kind in ("wrong", "broken") or (outcome.kind == "refused" and case.plain)


def main() -> None:
    expect_foreign_routes()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="the number of the first case")
    parser.add_argument("--case", help="a number, or a case as it was printed: only this one")
    parser.add_argument("--shrink", type=int, default=5, help="bad cases to make smaller")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with testing.megatron_on_cpu():
        if args.case:
            case = draw(int(args.case)) if args.case.isdigit() else Case.parse(args.case)
            outcome = judge(case)
            print(f"{case}\n{outcome.kind}: {outcome.text}")
            raise SystemExit(bad(case, outcome))
        raise SystemExit(many(args.seed, args.seconds, args.shrink))


def many(seed: int, seconds: float, shrink_first: int) -> bool:
    """Judge cases from this number on, for so long, and print; whether any was bad."""
    counts: Counter[str] = Counter()
    plain_refused = 0
    found: list[tuple[Case, Outcome]] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        case = draw(seed)
        outcome = judge(case)
        counts[outcome.kind] += 1
        if bad(case, outcome):
            plain_refused += outcome.kind == "refused"
            found.append((case, outcome))
            print(f"{seed}: {outcome.kind}: {outcome.text[:200]}\n  {case}", flush=True)
        seed += 1
    for case, outcome in found[:shrink_first]:
        small = shrink(case, outcome.kind)
        print(f"{case.seed}, made smaller: {judge(small).text[:200]}\n  {small}", flush=True)
    print(
        f"{counts.total()} cases, {counts['wrong']} wrong, {counts['refused']} refused "
        f"({plain_refused} of them without a fault or a thread), {counts['broken']} broken, "
        f"{counts['exact']} exact, {counts['void']} void"
    )
    return bool(found)


if __name__ == "__main__":
    main()
