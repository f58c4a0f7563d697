"""Replay: main routers take the experts that the rollout chose.

The way of a row: ``replay(microbatches)`` or ``feed`` -> `MicrobatchQueue.append`, which checks it
and makes it this chunk's own -> `MicrobatchQueue.take`, once per router and forward pass ->
`ReplayTap.select`, which gives Megatron its values and ids.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from r3patch._errors import ReplayError
from r3patch.labels.model import MainRouter
from r3patch.metrics import ExpertLoad
from r3patch.observe import trace
from r3patch.observe.stats import ENOUGH_ROWS, ReplayStats
from r3patch.rows.fit import Missing, check_fit
from r3patch.rows.routes import Routes
from r3patch.sessions import _preflight
from r3patch.sessions._alarm import Alarm, AlarmMode
from r3patch.sessions._measure import Measure, TokenFigures
from r3patch.sessions._microbatch import DeviceRows, Microbatch, check_size
from r3patch.sessions._recompute import CallLog, Surroundings, surroundings
from r3patch.sessions._session import Chunk, Lifetime, Plan, Session, readable
from r3patch.sessions._tap import Selection, Tap, TopkCall, unseen
from r3patch.sessions._tokens import TokenMode, TokenWatch

if TYPE_CHECKING:
    from r3patch.labels.model import Model

__all__ = ["ReplaySession"]

_KEPT_ON_DEVICE = 2  # 1F1B alternates between one microbatch's forward and another's recompute


class ReplaySession(Session):
    """``with replay(model, microbatches) as session:``; then ``session.stats``."""

    def __init__(
        self,
        model: Model,
        microbatches: Iterable[Routes],
        *,
        missing: Missing = "live",
        measure: bool = False,
        step: int | None = None,
        name: str | None = None,
        tokens: TokenMode = "check",
        alarm: AlarmMode = "warn",
    ) -> None:
        super().__init__("replay", model, step, name)
        self._prefilled = list(microbatches)
        self._missing: Missing = missing
        self._measure = measure
        self._tokens: TokenMode = tokens
        self._alarm = Alarm(alarm)
        self._queues: list[MicrobatchQueue] = []

    def __enter__(self) -> ReplaySession:
        """Check the model and the microbatches, and put the taps in place.

        Raises:
            ReplayError: the session was entered before, another one is open on the model, or a
                chunk or a router is there twice.
            RoutesError: a microbatch does not fit the model.
            UnsupportedMegatronError: Megatron or torch lacks what a session hangs on.
            UnsupportedRoutingError: a router's settings keep replay from it.
            UnlabelledRouterError, ScopeConflictError: see `r3patch.verify`.
        """
        try:
            self._enter(self._prepare)
        except BaseException as error:
            self._write_line(error)
            raise
        return self

    def open(self) -> ReplaySession:
        """As entering the ``with`` block, for frameworks that have hooks but no block."""
        return self.__enter__()

    def close(self, error: BaseException | None = None) -> None:
        """As leaving it; with `error`, as by that exception."""
        self.__exit__(None if error is None else type(error), error, None)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the routers back; on a clean exit, check that every row was taken.

        Raises:
            ReplayError: a main router did not take every microbatch: replay was a no-op in part.
                Rows belong to other tokens than the model got. The alarm rang, in mode "raise".
        """
        if not self._leave(error):
            return
        try:
            if error is None:
                for queue in self._queues:
                    queue.check_consumed()
                    queue.tokens.check()
                self._alarm.ring(self._overlap())
        except BaseException as failure:
            error = failure
            raise
        finally:
            for queue in self._queues:
                queue.release()
            self._write_line(error)

    def feed(self, routes: Routes, chunk: Any = None) -> None:
        """Append a microbatch, from inside ``forward_step`` for example.

        Args:
            routes: the rows of this rank, in the router's order.
            chunk: the model that ``forward_step`` was given; required where the session has
                several chunks, because each chunk runs every microbatch once.

        Raises:
            ReplayError: the session is not open, or the chunk is not one of its chunks.
            RoutesError: the routes do not fit the model.
        """
        if not self._lifetime.open:
            raise ReplayError("feed() works inside the `with replay(...)` block only.")
        self._queues[self._index_of(chunk)].append(routes, "feed()")

    @property
    def stats(self) -> ReplayStats:
        """What the session did so far, router by router. Measured figures wait for the device."""
        return ReplayStats(
            self._router_stats(),
            self._token_codes(),
            sum(queue.seconds for queue in self._queues),
            token_checks=tuple(queue.tokens.report() for queue in self._queues),
            first_rows=self._alarm.agreement(),
            alarmed=self._alarm.rang,
        )

    def _prepare(self, chunks: list[Chunk]) -> list[Plan]:
        self._queues = [
            MicrobatchQueue(
                chunk,
                missing=self._missing,
                figures=self._measure,
                probes=0 if self._alarm.mode == "off" else ENOUGH_ROWS,
                tokens=TokenWatch(chunk.module, chunk.index, chunk.main, self._tokens),
            )
            for chunk in chunks
        ]
        for number, routes in enumerate(self._prefilled):
            for queue in self._queues:
                queue.append(routes, f"microbatches[{number}]")
        self._prefilled = []
        return [
            Plan(
                queue.chunk,
                [
                    ReplayTap(router, queue, self._lifetime, self._alarm, measure=self._measure)
                    for router in queue.chunk.main
                ],
                queue,
                queue.tokens,
            )
            for queue in self._queues
        ]

    def _index_of(self, chunk: Any) -> int:
        if chunk is None:
            if len(self._chunks) == 1:
                return 0
            raise ReplayError(
                f"feed() needs chunk= on a model of {len(self._chunks)} chunks: pass the model "
                "that forward_step was given."
            )
        for index, known in enumerate(self._chunks):
            if _same_model(known, chunk):
                return index
        raise ReplayError(
            f"feed(chunk=...) got a {type(chunk).__qualname__} that is not one of the session's "
            f"{len(self._chunks)} chunks. Open the session on the model that forward_step gets."
        )

    def _overlap(self) -> float | None:
        """Of all measured rows with Megatron's choice; None if nothing was measured."""
        if not self._measure:
            return None
        routers = [router for router in self._router_stats() if router.rows_measured]
        experts = sum(router.rows_measured * router.topk for router in routers)
        return sum(router.experts_shared for router in routers) / experts if experts else None

    def _token_codes(self) -> bytes:
        """See ``ReplayStats.tokens``: a token differs where it does in any chunk."""
        longest = max((len(queue.figures) for queue in self._queues), default=0)
        codes = [
            functools.reduce(
                torch.maximum,
                [q.figures[index].codes() for q in self._queues if index < len(q.figures)],
            )
            for index in range(longest)
        ]
        return bytes(torch.cat(codes).tolist()) if codes else b""

    def _expert_load(self) -> ExpertLoad | None:
        parts = [queue.load for queue in self._queues if queue.load is not None]
        if not parts:
            return None
        layers = tuple(layer for part in parts for layer in part.layers)
        columns = zip(*((p.real, p.padding, p.invalid) for p in parts), strict=True)
        return ExpertLoad(layers, *map(torch.cat, columns))

    def _write_line(self, error: BaseException | None) -> None:
        self._trace(
            lambda: trace.session(
                "replay",
                step=self._step,
                name=self._name,
                stats=self.stats if readable(error) else None,
                notes=self._notes,
                expert_load=self._expert_load() if error is None else None,
                error=error,
            )
        )


class MicrobatchQueue:
    """The microbatches that one chunk replays, in the order of its forward passes.

    All routers of the chunk take microbatch i before one of them takes the next. A microbatch that
    they have taken is kept only by those who may need it again: the pass that is running, until it
    has returned, and the regions that a backward may repeat.
    """

    def __init__(
        self, chunk: Chunk, *, missing: Missing, figures: bool, probes: int, tokens: TokenWatch
    ) -> None:
        self.chunk = chunk
        self.column = {router.layer_number: index for index, router in enumerate(chunk.main)}
        self.given = 0
        self.seconds = 0.0
        self.figures: list[TokenFigures] = []
        self.load: ExpertLoad | None = None  # for the trace
        self.tokens = tokens
        self._missing: Missing = missing
        self._measure = figures
        self._probes, self._probed = probes, 0  # rows that the alarm wants, and has
        config = chunk.main[0].module.config if chunk.main else None
        self._ep_size = int(getattr(config, "expert_model_parallel_size", 1) or 1)
        self._mlp_chunks = _preflight.mlp_chunks(config) if chunk.main else 1
        self._waiting: dict[int, Microbatch] = {}
        self._oldest = 0  # of those that are kept
        self._current = 0  # the microbatch that the routers take now,
        self._taken: dict[int, int] = {}  # and how many of its rows each has, by layer number
        self._done: set[int] = set()  # the layers that have all of them
        self._pass: int | None = None  # what was current when the running pass began
        self._recent: list[Microbatch] = []  # those with rows on the device
        self._lock = threading.Lock()

    def append(self, routes: Routes, source: str) -> None:
        """Check a microbatch and make it the chunk's own.

        Raises:
            RoutesError: it does not fit the chunk's routers.
        """
        routers = self.chunk.main
        began = time.perf_counter()
        check_fit(
            routes, routers, source, num_experts=self.chunk.num_experts, missing=self._missing
        )
        if not routers:
            return
        routes = routes.select([router.layer_number for router in routers])
        microbatch = Microbatch(
            routes,
            routers,
            missing=self._missing,
            ep_size=self._ep_size,
            probes=0 if self._probed >= self._probes else self._probes,
        )
        self._probed += microbatch.num_probes
        self.tokens.remember(self.given, routes.tokens)
        self._waiting[self.given] = microbatch
        self.given += 1
        if self._measure:
            self.figures.append(TokenFigures(routes.mask.any(dim=1)))
        if trace.enabled():
            load = microbatch.expert_load(routes)
            self.load = load if self.load is None else self.load.merge(load)
        self.seconds += time.perf_counter() - began

    def take(self, router: MainRouter, num_tokens: int) -> Rows:
        """The rows for a router's next forward call: a microbatch, or a piece for a chunked MLP.

        Raises:
            ReplayError: there are none, their number is another one, or other routers of the chunk
                have yet to take theirs.
        """
        layer = router.layer_number
        with self._lock:
            if layer in self._done or self._pass not in (None, self._current):
                raise ReplayError(self._out_of_turn(router))
            microbatch = self._waiting.get(self._current)
            if microbatch is None:
                raise ReplayError(
                    f"{router.name}: forward call {self._current + 1} has no rows: {self.given} "
                    "microbatches were given. Give one per forward pass of the model, or call "
                    "session.feed(routes) before each. A recompute by hand, outside of autograd, "
                    "looks like one more forward pass: use torch.utils.checkpoint."
                )
            start = self._taken.get(layer, 0)
            check_size(microbatch.num_tokens, start, num_tokens, self._mlp_chunks, router.name)
            index, first = self._current, not self._taken
            self._taken[layer] = start + num_tokens
            if start + num_tokens == microbatch.num_tokens:
                self._done.add(layer)
                if len(self._done) == len(self.chunk.main):
                    self._advance()
        return Rows(microbatch, index, start, start + num_tokens, first)

    def begin(self) -> None:
        """See `Listener`."""
        self._pass = self._current
        self.tokens.restart()

    def commit(self) -> None:
        """See `Listener`."""
        if self._current == self._pass and self._taken:
            raise ReplayError(
                f"a forward pass of {self.chunk.name} has ended, and {self._behind()}. A router "
                "that took no rows never reached Megatron's top-k: something replaced its forward "
                "or routing."
            )
        self._pass = None
        self._drop_taken()

    def rollback(self) -> None:
        """See `Listener`."""
        assert self._pass is not None
        self._current, self._pass = self._pass, None
        self._taken.clear()
        self._done.clear()

    def on_device(self, microbatch: Microbatch, device: torch.device) -> DeviceRows:
        """The rows of a microbatch, copied at first use; the latest ones are kept."""
        rows = microbatch.on_device
        if rows is None:
            began = time.perf_counter()
            with self._lock:
                rows = microbatch.to_device(device)
                self._recent = [*(m for m in self._recent if m is not microbatch), microbatch]
                while len(self._recent) > _KEPT_ON_DEVICE:
                    self._recent.pop(0).on_device = None
                self.seconds += time.perf_counter() - began
        return rows.on_this_stream()

    def release(self) -> None:
        """Free the rows: the user may keep the session for its figures."""
        self._waiting.clear()
        for microbatch in self._recent:
            microbatch.on_device = None
        self._recent = []

    def check_consumed(self) -> None:
        """Raise unless every main router took every microbatch.

        Raises:
            ReplayError: with the router that is behind.
        """
        if not self.chunk.main or 0 < self.given == self._current:
            return
        if not self.given:
            raise ReplayError(
                f"{self.chunk.main[0].name} replayed 0 microbatches, 0 were given. Nothing was "
                "replayed: give microbatches, or leave the session out."
            )
        raise ReplayError(
            f"{self._behind()}. Give one microbatch per forward pass, and run the forward inside "
            "the block. A router that took none while others did never reached Megatron's top-k: "
            "something replaced its forward or routing."
        )

    def _advance(self) -> None:
        self._current += 1
        self._taken.clear()
        self._done.clear()
        if self._pass is None:
            self._drop_taken()

    def _drop_taken(self) -> None:
        while self._oldest < self._current:
            del self._waiting[self._oldest]
            self._oldest += 1

    def _behind(self) -> str:
        """The first router that has not all rows of the current microbatch, in words."""
        late = [r for r in self.chunk.main if r.layer_number not in self._done]
        rows = self._taken.get(late[0].layer_number, 0)
        return (
            f"{late[0].name} (layer {late[0].layer_number}) replayed {self._current} microbatches"
            f"{f' and {rows} rows of the next' if rows else ''}, {self.given} were given; so did "
            f"{len(late)} of {len(self.chunk.main)} main routers"
        )

    def _out_of_turn(self, router: MainRouter) -> str:
        if self._pass is not None and self._pass != self._current:
            return (
                f"{router.name}: a forward pass of {self.chunk.name} asks for a second microbatch. "
                "One pass takes one microbatch: open the session on the module whose forward runs "
                "once per microbatch."
            )
        return (
            f"{router.name} asks for the rows of microbatch {self._current + 1}, but "
            f"{self._behind()}. The forward before ended in the middle, or a router of this chunk "
            "was left out. Open a new session for a retry, or call the chunk that the session was "
            "opened on: a pass that it can see is rewound."
        )


class Rows(NamedTuple):
    """What one forward call takes: rows of a microbatch, and what Megatron itself chose."""

    microbatch: Microbatch
    number: int  # of the microbatch
    start: int
    stop: int
    first: bool  # of all routers of the chunk
    in_gaps: torch.Tensor | None = None  # [num_gaps, topk] int16: Megatron's choice, frozen
    own: torch.Tensor | None = None  # [num_tokens, topk] int16: Megatron's choice, if measured


class ReplayTap(Tap):
    """Gives a main router the rows of the rollout: microbatch after microbatch, whole ones."""

    def __init__(
        self,
        router: MainRouter,
        queue: MicrobatchQueue,
        lifetime: Lifetime,
        alarm: Alarm,
        *,
        measure: bool,
    ) -> None:
        super().__init__(router.info, queue.chunk.index)
        self._router = router
        self._queue = queue
        self._alarm = alarm
        self._column = queue.column[router.layer_number]
        grouped = bool(getattr(router.module.config, "moe_router_group_topk", None))
        self._ordered = {  # by whether grad is enabled
            grad: _preflight.sums_in_order(router)
            and _preflight.topk_sorts(grouped=grouped, grad_enabled=grad)
            for grad in (False, True)
        }
        self._measure = Measure(router.num_experts) if measure else None
        self._calls: CallLog[Rows] = CallLog(functools.partial(_guard, lifetime))

    def select(self, call: TopkCall) -> Selection:
        """See `Tap`."""
        self.refuse_capture(call.scores)
        around = surroundings()
        with unseen():
            ids = self._forward(call, around) if around.forward else self._recompute(call, around)
        return call.scores.gather(1, ids), ids

    def counts(self) -> dict[str, int]:
        """See `Tap`."""
        return super().counts() | (self._measure.counts() if self._measure is not None else {})

    def _forward(self, call: TopkCall, around: Surroundings) -> torch.Tensor:
        rows = self._queue.take(self._router, call.scores.shape[0])
        if rows.first:
            self.refuse_second_manager()
            there = self._queue.on_device(rows.microbatch, call.scores.device)
            self._queue.tokens.compare(rows.microbatch, rows.number, there)
        ids, gaps = self._rollout(rows, call)
        own = None if self._measure is None else call.own_ids()
        in_gaps = None
        if gaps is not None and not rows.microbatch.spread:
            in_gaps = call.own_ids(gaps) if own is None else own.index_select(0, gaps)
        if around.inside:
            rows = rows._replace(in_gaps=_narrow(in_gaps), own=_narrow(own))
            self._calls.forward(rows, around)
        self._count(rows)
        if gaps is not None and in_gaps is not None:
            ids = ids.index_copy(0, gaps, in_gaps)
        self._probe(call, rows, ids, own)
        ids = self._in_order(call, ids)
        if self._measure is None or own is None:
            return ids
        same, differs = self._measure.forward(ids, own, gaps)
        self._queue.figures[rows.number].add(differs, rows.start)
        return torch.where(same.unsqueeze(1), own, ids)

    def _recompute(self, call: TopkCall, around: Surroundings) -> torch.Tensor:
        rows = self._calls.recompute(self._router.name, around)
        if rows.first:
            self.refuse_second_manager()
        self.recompute_calls += 1
        if rows.stop - rows.start != call.scores.shape[0]:
            raise ReplayError(
                f"{self._router.name}: recompute asks for {call.scores.shape[0]} rows, its forward "
                f"call took {rows.stop - rows.start}. A checkpointed region must run the same "
                "calls twice."
            )
        ids, gaps = self._rollout(rows, call)
        if gaps is not None and rows.in_gaps is not None:
            ids = ids.index_copy(0, gaps, rows.in_gaps.to(torch.int64))
        ids = self._in_order(call, ids)
        if self._measure is None or rows.own is None:
            return ids
        own = call.own_ids()
        same = self._measure.recompute(ids, own, rows.own)
        return torch.where(same.unsqueeze(1), own, ids)

    def _probe(
        self, call: TopkCall, rows: Rows, ids: torch.Tensor, own: torch.Tensor | None
    ) -> None:
        """Show the alarm a few rows of the first microbatches."""
        there = rows.microbatch.on_device
        probes = None if there is None else there.probes[self._column]
        if probes is None:
            return
        if len(ids) < rows.microbatch.num_tokens:  # a piece for a chunked MLP
            first, last = rows.microbatch.probes_between(self._column, rows.start, rows.stop)
            probes = probes[first:last] - rows.start
        if not len(probes):
            return
        own = call.own_ids(probes) if own is None else own.index_select(0, probes)
        self._alarm.add(ids.index_select(0, probes), own, self._router.num_experts)

    def _rollout(self, rows: Rows, call: TopkCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rollout's ids ``[num_tokens, topk] int64``, and the rows that have none."""
        there = self._queue.on_device(rows.microbatch, call.scores.device)
        ids, gaps = there.ids[self._column], there.gaps[self._column]
        if rows.stop - rows.start != rows.microbatch.num_tokens:
            ids = ids[rows.start : rows.stop]
            first, last = rows.microbatch.gaps_between(self._column, rows.start, rows.stop)
            gaps = gaps[first:last] - rows.start if gaps is not None and last > first else None
        return ids.to(torch.int64), gaps

    def _in_order(self, call: TopkCall, ids: torch.Tensor) -> torch.Tensor:
        """The ids of each row in the order in which Megatron would have put them.

        Megatron sums over a row's gate weights in the order of its ids, and engines return ids in
        any order: the same set in another order gives other bits.
        """
        if not self._ordered[torch.is_grad_enabled()]:
            return ids
        order = call.scores.detach().gather(1, ids).argsort(dim=1, descending=True, stable=True)
        return ids.gather(1, order)

    def _count(self, rows: Rows) -> None:
        self.forward_calls += 1
        first, last = rows.microbatch.gaps_between(self._column, rows.start, rows.stop)
        if rows.microbatch.spread:
            self.rows_spread += last - first
        else:
            self.rows_live += last - first
        self.rows_replayed += rows.stop - rows.start - (last - first)


def _narrow(ids: torch.Tensor | None) -> torch.Tensor | None:
    return None if ids is None else ids.to(torch.int16)


def _guard(lifetime: Lifetime, owner: Any) -> None:
    """A recompute that comes after the session must not route live in silence."""

    def refuse(*_: object) -> None:
        if not lifetime.open:
            raise ReplayError(
                "backward runs after its replay session was left, and its activation recompute "
                "would route live. Run backward inside the `with replay(...)` block."
            )

    if isinstance(owner, torch._C._FunctionBase):  # the node of a reentrant checkpoint
        owner.register_prehook(refuse)
        return
    run = getattr(owner, "recompute_fn", None)  # the frame of a non-reentrant one
    if run is None:
        raise ReplayError(
            f"a {type(owner).__qualname__} of a non-reentrant checkpoint has no recompute_fn: this "
            "checkpoint implementation is not known. Use reentrant checkpoints."
        )

    @functools.wraps(run)
    def recompute(*args: Any, **kwargs: Any) -> Any:
        refuse()
        return run(*args, **kwargs)

    owner.recompute_fn = recompute


def _same_model(known: torch.nn.Module, given: Any) -> bool:
    """Whether two wrappings (DDP, Float16Module, torch.compile) hold the same model."""
    return known is given or (
        isinstance(given, torch.nn.Module)
        and (any(m is given for m in known.modules()) or any(m is known for m in given.modules()))
    )
