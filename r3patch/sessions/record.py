"""Record: what the main routers choose by themselves, microbatch by microbatch."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import torch

from r3patch._errors import ReplayError
from r3patch.labels.model import MainRouter
from r3patch.metrics import ExpertLoad, expert_load
from r3patch.observe import trace
from r3patch.observe.stats import ReplayStats
from r3patch.rows.checks import stored_dtype
from r3patch.rows.routes import Routes
from r3patch.sessions import _preflight
from r3patch.sessions._recompute import in_recompute, surroundings
from r3patch.sessions._session import Chunk, Plan, Session, readable
from r3patch.sessions._tap import Selection, Tap, TopkCall, unseen

if TYPE_CHECKING:
    from r3patch.labels.model import Model

__all__ = ["RecordSession"]


class RecordSession(Session):
    """``with record(model) as recording:``; then ``recording.routes``."""

    def __init__(self, model: Model, *, step: int | None = None, name: str | None = None) -> None:
        super().__init__("record", model, step, name)
        self._recordings: list[Recording] = []
        self._routes: list[Routes] | None = None

    def __enter__(self) -> RecordSession:
        """Check the model and put the taps in place.

        Raises:
            ReplayError: the session was entered before, another one is open on the model, or a
                chunk, a router or a layer number is there twice.
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

    def open(self) -> RecordSession:
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
        """Give the routers back; on a clean exit, check that whole forward passes were recorded.

        Raises:
            ReplayError: nothing was recorded, or half a forward.
        """
        if not self._leave(error):
            return
        try:
            if error is None:
                self._routes = self._collect()
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._write_line(error)

    @property
    def routes(self) -> list[Routes]:
        """The recorded microbatches, the layers of all chunks merged; every row is valid.

        Empty on a rank whose chunks have no main router (a pipeline stage of dense layers).

        Raises:
            ReplayError: the session is open, was left by an exception that recorded less than
                whole forward passes, or recorded nothing.
        """
        if self._lifetime.open or not self._lifetime.entered:
            raise ReplayError("recording.routes is there after the `with record(...)` block.")
        if self._routes is None:
            self._routes = self._collect()
        return self._routes

    @property
    def stats(self) -> ReplayStats:
        """What the session did so far, router by router."""
        return ReplayStats(self._router_stats())

    def _prepare(self, chunks: list[Chunk]) -> list[Plan]:
        _refuse_two_models(chunks)
        plans = []
        for chunk in chunks:
            recording = Recording(chunk.main)
            self._recordings.append(recording)
            taps = [RecordTap(router, chunk.index, recording) for router in chunk.main]
            plans.append(Plan(chunk, taps, recording))
        return plans

    def _collect(self) -> list[Routes]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies to the host were not waited for
        columns: dict[int, list[torch.Tensor]] = {}
        for recording in self._recordings:
            columns.update(recording.columns())
        if not self._main:
            return []
        experts = max(router.num_experts for router in self._main)
        return _microbatches(columns, experts)

    def _write_line(self, error: BaseException | None) -> None:
        self._trace(
            lambda: trace.session(
                "record",
                step=self._step,
                name=self._name,
                stats=self.stats if readable(error) else None,
                notes=self._notes,
                expert_load=_load(self.routes) if error is None else None,
                error=error,
            )
        )


def _refuse_two_models(chunks: list[Chunk]) -> None:
    """Raise if two chunks have a layer in common: a recording has one column for each layer."""
    of_layer: dict[int, Chunk] = {}
    for chunk in chunks:
        for router in chunk.main:
            other = of_layer.setdefault(router.layer_number, chunk)
            if other is not chunk:
                raise ReplayError(
                    f"layer {router.layer_number} is in {other.name} and in {chunk.name}: these "
                    "are not chunks of one model. Record each model in a session of its own."
                )


class Recording:
    """The ids that one chunk's main routers chose, copied to the host without blocking.

    The calls of one forward pass of the chunk are one microbatch. Where its forward is not called
    (combined 1F1B), every call of a router is.
    """

    def __init__(self, routers: list[MainRouter]) -> None:
        self._pieces: dict[int, list[tuple[int | None, torch.Tensor]]] = {
            router.layer_number: [] for router in routers
        }
        self._chunked = any(_preflight.mlp_chunks(r.module.config) > 1 for r in routers)
        self._passes = 0
        self._open: int | None = None  # the number of the pass that is running
        self._before: dict[int, int] = {}  # how many pieces each layer had before it

    def begin(self) -> None:
        """See `Listener`."""
        self._passes += 1
        self._open = self._passes
        self._before = {layer: len(pieces) for layer, pieces in self._pieces.items()}

    def commit(self) -> None:
        """See `Listener`."""
        self._open = None

    def rollback(self) -> None:
        """See `Listener`."""
        self._open = None
        for layer, count in self._before.items():
            del self._pieces[layer][count:]

    def add(self, router: MainRouter, ids: torch.Tensor) -> None:
        """Keep the ids ``[num_tokens, topk]`` of one forward call."""
        if self._chunked and self._open is None:
            raise ReplayError(
                f"{router.name}: with mlp_chunks the router is called several times a microbatch, "
                "and outside of the chunk's forward nothing says which calls are one. Call the "
                "chunk that the session was opened on."
            )
        narrow = ids.detach().to(stored_dtype(router.num_experts))
        host = torch.empty_like(narrow, device="cpu", pin_memory=narrow.is_cuda)
        host.copy_(narrow, non_blocking=True)
        self._pieces[router.layer_number].append((self._open, host))

    def columns(self) -> dict[int, list[torch.Tensor]]:
        """For each layer the ids ``[num_tokens, topk]`` of each microbatch."""
        columns: dict[int, list[torch.Tensor]] = {}
        for layer, pieces in self._pieces.items():
            passes: dict[object, list[torch.Tensor]] = {}
            for index, (forward_pass, ids) in enumerate(pieces):
                key = ("call", index) if forward_pass is None else forward_pass
                passes.setdefault(key, []).append(ids)
            columns[layer] = [torch.cat(ids) for ids in passes.values()]
        return columns


class RecordTap(Tap):
    """Lets Megatron choose and hands the ids to the recording; a recompute records nothing."""

    def __init__(self, router: MainRouter, chunk: int, recording: Recording) -> None:
        super().__init__(router.info, chunk)
        self._router = router
        self._recording = recording

    def select(self, call: TopkCall) -> Selection:
        """See `Tap`."""
        self.refuse_capture(call.scores)
        self.refuse_second_manager()
        if in_recompute() and surroundings().repeats is None:
            raise ReplayError(
                f"{self._router.name}: a call inside backward repeats no checkpointed region that "
                "is known. A forward pass in a backward hook would not be recorded: run it outside."
            )
        values, ids = super().select(call)
        if not in_recompute():
            with unseen():
                self._recording.add(self._router, ids)
        return values, ids


def _microbatches(columns: dict[int, list[torch.Tensor]], num_experts: int) -> list[Routes]:
    """Columns of one layer each, ``[num_tokens, topk]`` per microbatch, as Routes of all layers."""
    layers = tuple(sorted(columns))
    calls = {layer: len(columns[layer]) for layer in layers}
    if len(set(calls.values())) != 1 or not calls[layers[0]]:
        raise ReplayError(
            f"the main routers ran unequal or no forwards: calls by layer number {calls}. Run "
            "whole forward passes inside the `with record(...)` block."
        )
    routes = []
    for index in range(calls[layers[0]]):
        parts = [columns[layer][index] for layer in layers]
        tokens = {layer: len(part) for layer, part in zip(layers, parts, strict=True)}
        if len(set(tokens.values())) != 1:
            raise ReplayError(f"microbatch {index} has unequal token counts by layer: {tokens}.")
        ids = torch.stack([part.to(stored_dtype(num_experts)) for part in parts], dim=1)
        routes.append(Routes(ids, layers, num_experts=num_experts))
    return routes


def _load(microbatches: list[Routes]) -> ExpertLoad | None:
    parts = [expert_load(routes) for routes in microbatches]
    return parts[0].merge(*parts[1:]) if parts else None
