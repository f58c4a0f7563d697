"""Record and replay: for the time of a ``with`` block, a model's routers follow the rollout.

Everything that can be checked is checked on entry and at ``feed``: a rank that raises in the middle
of a step leaves the others waiting in a collective.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch

from r3patch import _config
from r3patch._errors import ReplayError, RoutesError
from r3patch.labels import model as models
from r3patch.labels.model import RouterInfo
from r3patch.metrics import ExpertLoad, expert_load
from r3patch.observe.stats import ReplayStats, RouterStats
from r3patch.rows.routes import Routes
from r3patch.sessions import _preflight
from r3patch.sessions._session import Session
from r3patch.sessions._stream import RecordStream, ReplayStream
from r3patch.sessions._tap import RecordTap, ReplayTap, Tap

__all__ = [
    "RecordSession",
    "ReplayManager",
    "ReplaySession",
    "ReplayStats",
    "RouterStats",
    "record",
    "replay",
]

Missing = Literal["live", "spread", "error"]


def record(model: Any) -> RecordSession:
    """``ReplayManager(model).record()``."""
    return ReplayManager(model).record()


def replay(
    model: Any,
    microbatches: Iterable[Routes] = (),
    *,
    missing: Missing = "live",
    measure: bool | None = None,
    step: int | None = None,
) -> ReplaySession:
    """``ReplayManager(model).replay(...)``."""
    return ReplayManager(model).replay(microbatches, missing=missing, measure=measure, step=step)


class ReplayManager:
    """Opens record and replay sessions on a model.

    Args:
        model: a module or a list of chunks (virtual pipeline), wrapped (DDP, Float16Module) or not.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def record(self) -> RecordSession:
        """A session whose ``routes`` are what the main routers choose by themselves.

        Routers in scope "mtp" are left alone. Enter it by ``with``; ``routes`` is there after it.
        """
        return RecordSession(self.model)

    def replay(
        self,
        microbatches: Iterable[Routes] = (),
        *,
        missing: Missing = "live",
        measure: bool | None = None,
        step: int | None = None,
    ) -> ReplaySession:
        """A session in which main routers use the given experts; routers in scope "mtp" never do.

        Forward and backward must both run inside the ``with`` block. The i-th forward pass of each
        chunk takes the i-th microbatch.

        Args:
            microbatches: for each microbatch the rows of this rank in the router's order, as
                ``Layout.place`` gives them; a column for every MoE layer of the rank, others are
                ignored. More can be added by ``session.feed``.
            missing: what an invalid row gets: ``"live"``, Megatron's own choice, kept for
                recompute; ``"spread"``, distinct experts in turn; ``"error"``, a RoutesError.
            measure: compare with Megatron's own choice (costs a top-k per call). None means the
                environment's R3PATCH_MEASURE.
            step: the training step, for the trace.
        """
        if isinstance(microbatches, Routes):
            raise ReplayError("replay() got one Routes; it takes a list, one for each microbatch.")
        if missing not in ("live", "spread", "error"):
            raise ReplayError(f"missing={missing!r}; it takes 'live', 'spread' or 'error'.")
        measure = _config.CONFIG.measure if measure is None else measure
        return ReplaySession(self.model, list(microbatches), missing, measure, step)


class RecordSession(Session[RecordStream]):
    """``with record(model) as recording:``; then ``recording.routes``."""

    kind = "record"

    @functools.cached_property
    def routes(self) -> list[Routes]:
        """The recorded microbatches, the layers of all chunks merged; every row is valid.

        Empty on a rank whose chunks have no main router (a pipeline stage of dense layers).

        Raises:
            ReplayError: the session is open, recorded nothing, or its routers were called
                different numbers of times or with different numbers of tokens.
        """
        if self._gate.open or not self._entered:
            raise ReplayError("recording.routes is there after the `with record(...)` block.")
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies to the host were not waited for
        if not any(stream.layers for stream in self._streams):
            return []
        columns: dict[int, list[torch.Tensor]] = {}
        for chunk, stream in zip(self._chunks, self._streams, strict=True):
            chunked = any(_preflight.mlp_chunks(c) > 1 for c in _configs(chunk))
            columns.update(stream.columns(chunked=chunked))
        return _microbatches(columns, self._num_experts())

    def _num_experts(self) -> int:
        return next(
            int(tap.info.module.config.num_moe_experts)
            for _, tap in self._taps
            if isinstance(tap, RecordTap)
        )

    def _expert_load(self) -> ExpertLoad | None:
        parts = [expert_load(routes) for routes in self.routes]
        return parts[0].merge(*parts[1:]) if parts else None

    def _end(self) -> None:
        _ = self.routes  # a recording of nothing, or of half a forward, raises here

    def _stream(self, main: list[RouterInfo]) -> RecordStream:
        experts = max((int(info.module.config.num_moe_experts) for info in main), default=0)
        return RecordStream(main, num_experts=experts)

    def _tap(self, info: RouterInfo, stream: RecordStream) -> Tap:
        return RecordTap(info, stream)

    def _after_forward(self, stream: RecordStream) -> Callable[[Any, Any, Any], None]:
        def count(module: Any, args: Any, output: Any) -> None:
            stream.forward_pass += 1

        return count


class ReplaySession(Session[ReplayStream]):
    """``with replay(model, microbatches) as session:``; then ``session.stats``."""

    kind = "replay"

    def __init__(
        self,
        model: Any,
        microbatches: list[Routes],
        missing: Missing,
        measure: bool,
        step: int | None,
    ) -> None:
        super().__init__(model, step)
        self._prefilled = microbatches
        self._missing: Missing = missing
        self._measure = measure

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
        if not self._gate.open:
            raise ReplayError("feed() works inside the `with replay(...)` block only.")
        self._append(routes, [self._streams[self._chunk_index(chunk)]], "feed()")

    def _chunk_index(self, chunk: Any) -> int:
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

    def _append(self, routes: Routes, streams: Sequence[ReplayStream], source: str) -> None:
        for stream in streams:
            check_routes(routes, self._main(stream), source, missing=self._missing)
        for stream in streams:
            stream.append(routes)

    def _main(self, stream: ReplayStream) -> list[RouterInfo]:
        return [t.info for _, t in self._taps if isinstance(t, ReplayTap) and t.stream is stream]

    def _begin(self) -> None:
        for number, routes in enumerate(self._prefilled):
            self._append(routes, self._streams, f"microbatches[{number}]")
        self._prefilled = []

    def _close(self) -> None:
        super()._close()
        for stream in self._streams:
            stream.release()

    def _end(self) -> None:
        """Every main router must have taken every microbatch, or replay was a no-op in part."""
        taps = [tap for _, tap in self._taps if isinstance(tap, ReplayTap)]
        for tap in taps:
            given = len(tap.stream.microbatches)
            if tap.microbatch == given and tap.offset == 0 and given:
                continue
            rest = f" and {tap.offset} rows of the next" if tap.offset else ""
            short = sum(o.microbatch < given for o in taps)
            raise ReplayError(
                f"{tap.info.name} (layer {tap.info.layer_number}) replayed {tap.microbatch} "
                f"microbatches{rest}, {given} were given; so did {short} of {len(taps)} main "
                "routers. "
                + (
                    "Give one microbatch per forward pass, and run the forward inside the block. A "
                    "router that took none while others did never reached Megatron's top-k: "
                    "something replaced its forward or routing."
                    if given
                    else "Nothing was replayed: give microbatches, or leave the session out."
                )
            )

    def _token_codes(self) -> bytes:
        if not self._measure:
            return b""
        codes: list[torch.Tensor] = []
        longest = max((len(stream.microbatches) for stream in self._streams), default=0)
        for index in range(longest):
            parts = [
                stream.microbatches[index].token_codes()
                for stream in self._streams
                if index < len(stream.microbatches)
            ]
            codes.append(functools.reduce(torch.maximum, parts))
        return bytes(torch.cat(codes).tolist()) if codes else b""

    def _expert_load(self) -> ExpertLoad | None:
        parts = [load for stream in self._streams if (load := stream.expert_load()) is not None]
        if not parts:
            return None
        layers = tuple(layer for part in parts for layer in part.layers)
        columns = zip(*((p.real, p.padding, p.invalid) for p in parts), strict=True)
        return ExpertLoad(layers, *map(torch.cat, columns))

    def _stream(self, main: list[RouterInfo]) -> ReplayStream:
        config = main[0].module.config if main else None
        return ReplayStream(
            main,
            missing=self._missing,
            ep_size=int(getattr(config, "expert_model_parallel_size", 1) or 1),
            mlp_chunks=_preflight.mlp_chunks(config) if main else 1,
        )

    def _tap(self, info: RouterInfo, stream: ReplayStream) -> Tap:
        grouped = bool(getattr(info.module.config, "moe_router_group_topk", None))
        sorts = functools.partial(_preflight.topk_sorts, grouped=grouped)
        sorts()  # ask Megatron now, not in the middle of a forward
        return ReplayTap(info, stream, topk_sorts=sorts, measure=self._measure)

    def _after_forward(self, stream: ReplayStream) -> Callable[[Any, Any, Any], None]:
        """A forward whose recompute comes after the session must not route live in silence."""
        gate = self._gate

        def refuse_when_closed(grad: torch.Tensor) -> None:
            if not gate.open:
                raise ReplayError(
                    "backward runs after its replay session was left, and its activation recompute "
                    "would route live. Run backward inside the `with replay(...)` block."
                )

        def watch(module: Any, args: Any, output: Any) -> None:
            if stream.recomputable:
                for tensor in _tensors(output):
                    if tensor.requires_grad:
                        tensor.register_hook(refuse_when_closed)  # type: ignore[no-untyped-call]
            stream.recomputable = False

        return watch


def check_routes(
    routes: Routes, routers: Sequence[RouterInfo], source: str, *, missing: str = "live"
) -> None:
    """Refuse routes that do not fit the main routers of a chunk.

    Raises:
        RoutesError: a layer without a column, another topk or number of experts, or invalid rows
            under ``missing="error"``.
    """
    if not isinstance(routes, Routes):
        raise RoutesError(
            f"{source} is a {type(routes).__qualname__}, expected r3patch.Routes: decode the "
            "payloads by r3patch.decode and place them by Layout.place."
        )
    for info in routers:
        if info.layer_number not in routes.layers:
            raise RoutesError(
                f"{source} has no column for {info.name} (layer {info.layer_number}); its columns "
                f"are layers {list(routes.layers)}. Columns carry 1-based Megatron layer numbers, "
                "dense layers counted: see r3patch.moe_layers(config)."
            )
        config = info.module.config
        wanted = (int(config.moe_router_topk), int(config.num_moe_experts))
        if (routes.topk, routes.num_experts) != wanted:
            raise RoutesError(
                f"{source} is top-{routes.topk} of {routes.num_experts} experts, {info.name} is "
                f"top-{wanted[0]} of {wanted[1]}. Decode with the trained model's numbers."
            )
    if routers and missing == "error" and routes.valid is not None:
        columns = routes.select([info.layer_number for info in routers if info.layer_number])
        invalid = 0 if columns.valid is None else int((~columns.valid).sum())
        if invalid:
            raise RoutesError(
                f"{source} has {invalid} rows without routes and the session was opened with "
                "missing='error'. Padding and each sample's last token have none: use "
                "missing='live' or 'spread'."
            )


def _microbatches(columns: dict[int, list[torch.Tensor]], num_experts: int) -> list[Routes]:
    """Columns of one layer each, ``[num_tokens, topk]`` per microbatch, as Routes of all layers."""
    layers = tuple(sorted(columns))
    calls = {layer: len(columns[layer]) for layer in layers}
    if not layers or len(set(calls.values())) != 1 or not calls[layers[0]]:
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
        routes.append(Routes(torch.stack(parts, dim=1), layers, num_experts=num_experts))
    return routes


def _configs(chunk: torch.nn.Module) -> Iterable[Any]:
    return (info.module.config for info in models.routers(chunk))


def _same_model(known: torch.nn.Module, given: Any) -> bool:
    """Whether two wrappings (DDP, Float16Module, torch.compile) hold the same model."""
    return known is given or (
        isinstance(given, torch.nn.Module)
        and (any(m is given for m in known.modules()) or any(m is known for m in given.modules()))
    )


def _tensors(output: Any) -> Iterable[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        return [t for value in output.values() for t in _tensors(value)]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in _tensors(value)]
    return []
