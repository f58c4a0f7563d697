"""The doors: record and replay, for the time of a ``with`` block.

Everything that can be checked is checked on entry and at ``feed``: a rank that raises in the middle
of a step leaves the others waiting in a collective.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from r3patch import _config
from r3patch._errors import ReplayError
from r3patch.rows.fit import Missing
from r3patch.rows.routes import Routes
from r3patch.sessions._alarm import AlarmMode
from r3patch.sessions._tokens import TokenMode
from r3patch.sessions.record import RecordSession
from r3patch.sessions.replay import ReplaySession

if TYPE_CHECKING:
    from r3patch.labels.model import Model

__all__ = ["RecordSession", "ReplayManager", "ReplaySession", "record", "replay"]


def record(model: Model, *, step: int | None = None, name: str | None = None) -> RecordSession:
    """Record which experts a model's main routers choose by themselves.

    ::

        with r3patch.record(model) as recording:
            forward_backward_func(..., forward_only=True)
        recording.routes  # one Routes per microbatch, the layers of all chunks merged

    Routers in scope "mtp" are left alone. A recompute records nothing.

    Args:
        model: a module or a list of chunks (virtual pipeline), wrapped (DDP, Float16Module) or not.
        step: the training step, for the trace.
        name: the phase of the step, such as "log-probs", for the trace.

    Returns:
        A session, to be entered by ``with``. Its ``routes`` are there after the block; each has
        ``experts [num_tokens, num_layers, topk]``, this rank's tokens in the router's order and
        this rank's layers. The calls of one forward pass of a chunk are one microbatch.

    Raises:
        TypeError: the model is neither a module nor a list of modules; all others on entering:
        UnsupportedMegatronError: Megatron before 0.16.
        UnsupportedRoutingError: a router's settings keep a session from it; a model without MoE.
        UnlabelledRouterError, ScopeConflictError: labels cannot be trusted, see `r3patch.verify`.
        ReplayError: another session is open on the model; a chunk or a router is there twice.
    """
    return RecordSession(model, step=step, name=name)


def replay(
    model: Model,
    microbatches: Iterable[Routes] = (),
    *,
    missing: Missing = "live",
    measure: bool | None = None,
    step: int | None = None,
    name: str | None = None,
    tokens: TokenMode = "check",
    alarm: AlarmMode | None = None,
) -> ReplaySession:
    """Make a model's main routers use the given experts; routers in scope "mtp" never do.

    ::

        layout = r3patch.Layout.from_megatron(config)
        with r3patch.replay(model, [layout.place(samples) for samples in step]) as session:
            forward_backward_func(...)  # forward and backward, any schedule, any recompute
        session.stats.total("main").rows_replayed

    The i-th forward pass of each chunk takes the i-th microbatch, evaluation passes included. A
    pass that ends by an exception is rewound: its retry takes the same rows, and no other chunk may
    go on before. Gate weights are computed from the live scores, so gradients reach the routers.

    Args:
        model: a module or a list of chunks (virtual pipeline), wrapped (DDP, Float16Module) or not.
        microbatches: a `Routes` for each, ``experts [num_tokens, num_layers, topk]``: the rows of
            this rank in the router's order, as ``Layout.place`` gives them, with a column for
            every MoE layer of this rank; other columns are ignored. The session keeps copies. More
            can be added by ``session.feed``.
        missing: what a row without routes gets: ``"live"``, Megatron's own choice, kept for
            recompute; ``"spread"``, distinct experts in turn; ``"error"``, a RoutesError.
        measure: compare with Megatron's own choice (costs a top-k per call). None means the
            environment's R3PATCH_MEASURE.
        step: the training step, for the trace.
        name: the phase of the step, such as "train", for the trace.
        tokens: where routes carry the tokens that they were computed for, they are compared with
            what the model gets. ``"check"`` raises on leaving the block, before the optimizer step;
            ``"strict"`` at once where ids are on the CPU; ``"ignore"`` is for trainers that replace
            input tokens on purpose.
        alarm: what happens on leaving where the first rows hardly agree with Megatron's own choice:
            ``"warn"``, ``"raise"`` or ``"off"``. None means the environment's R3PATCH_ALARM.

    Returns:
        A session, to be entered by ``with``; ``session.stats`` says what each router did.

    Raises:
        ReplayError: ``microbatches`` is one `Routes`; ``missing``, ``tokens`` or ``alarm`` is no
            such word.
        TypeError: the model is neither a module nor a list of modules.
        RoutesError: on entering or at ``feed``, besides the errors that `record` has there: a
            microbatch does not fit the model (a layer without a column, another topk or number of
            experts, rows without routes under ``missing="error"``).
        ReplayError: in the block: a call has no rows or another number of tokens, a recompute
            cannot be matched to its forward, or a chunk goes on before one whose pass failed. On
            leaving it: a router has not taken every microbatch, rows belong to other tokens, or
            the alarm rang and is to raise.
    """
    if isinstance(microbatches, Routes):
        raise ReplayError("replay() got one Routes; it takes a list, one for each microbatch.")
    if missing not in ("live", "spread", "error"):
        raise ReplayError(f"missing={missing!r}; it takes 'live', 'spread' or 'error'.")
    if tokens not in ("check", "strict", "ignore"):
        raise ReplayError(f"tokens={tokens!r}; it takes 'check', 'strict' or 'ignore'.")
    if alarm not in (None, "warn", "raise", "off"):
        raise ReplayError(f"alarm={alarm!r}; it takes 'warn', 'raise' or 'off'.")
    return ReplaySession(
        model,
        microbatches,
        missing=missing,
        measure=_config.CONFIG.measure if measure is None else measure,
        step=step,
        name=name,
        tokens=tokens,
        alarm=_config.CONFIG.alarm if alarm is None else alarm,
    )


class ReplayManager:
    """Opens record and replay sessions on a model: `record` and `replay` with the model given once.

    Args:
        model: a module or a list of chunks (virtual pipeline), wrapped (DDP, Float16Module) or not.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def record(self, *, step: int | None = None, name: str | None = None) -> RecordSession:
        """See `r3patch.record`."""
        return record(self.model, step=step, name=name)

    def replay(
        self,
        microbatches: Iterable[Routes] = (),
        *,
        missing: Missing = "live",
        measure: bool | None = None,
        step: int | None = None,
        name: str | None = None,
        tokens: TokenMode = "check",
        alarm: AlarmMode | None = None,
    ) -> ReplaySession:
        """See `r3patch.replay`."""
        return replay(
            self.model,
            microbatches,
            missing=missing,
            measure=measure,
            step=step,
            name=name,
            tokens=tokens,
            alarm=alarm,
        )
