"""Training on from the same weights, in four ways, and what an engine would serve of it.

Each arm trains the demo's model on its text. Before a step the engine, a bf16 copy of the model
that is refreshed every few steps as weights are synchronised in RL, runs the batch and its routes
are recorded: the rollout. Now and then it runs the whole text, refreshed and without replay, as it
would serve it: how many of the tokens that MTP drafts does the main model accept?
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import r3patch
from r3patch import _config
from r3patch.cli.demo import model as models
from r3patch.cli.demo.results import Arm, Difference, Excerpt, Point
from r3patch.metrics import PolicyGap, RouteMismatch, policy_gap, route_mismatch

BATCH = 8  # samples
LEARNING_RATE = 3e-4
MTP_LOSS_SCALE = 0.3
REFRESH = 4  # steps between two refreshes of the engine's weights
EVERY = 2 * REFRESH  # steps between two points
SHOWN = 48  # tokens of text that are shown


def train_on(
    arm: Arm, steps: int, seed: int, weights: Path, trace: Path | None = None
) -> Iterator[Point | Excerpt | None]:
    """Train on from weights; yields at each step what there is, and at last an excerpt.

    Args:
        arm: without replay it gives the excerpt.
        steps: of the optimizer.
        seed: of the batches; the same for every arm, so that they see the same ones.
        weights: a file of `model.save`.
        trace: where a session with replay writes its trace.
    """
    scale = MTP_LOSS_SCALE if arm.trains_mtp else 0.0
    model = models.build(mtp_loss_scaling_factor=scale)
    models.load(model, weights)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    engine = models.engine()
    data = models.batches(BATCH, seed)
    since: list[_Step] = []
    yield _point(0, model, engine, since)
    for step in range(1, steps + 1):
        batch = next(data)
        routes, logprobs = _rollout(engine, batch)
        optimizer.zero_grad()
        with _config.override(trace=str(trace)) if trace else nullcontext():
            taken, trained = _forward_backward(model, arm, batch, routes, logprobs, step)
        optimizer.step()
        since.append(taken)
        if step % EVERY == 0 or step == steps:
            yield _point(step, model, engine, since)
            since = []
            continue
        if step % REFRESH == 0:
            engine.load_state_dict(model.state_dict())
        yield None
    if not arm.replay:
        yield _excerpt(batch, routes, trained)


@dataclass(frozen=True)
class _Step:
    trained_loss: float
    gap: PolicyGap
    mismatch: RouteMismatch


def _rollout(engine: Any, batch: dict[str, Any]) -> tuple[Any, Tensor]:
    """What the engine chose for the batch, and its log-probs ``[BATCH, LENGTH]``."""
    with torch.no_grad(), models.Products(), r3patch.record(engine) as recording:
        logprobs = -engine(**batch).float()
    (routes,) = recording.routes
    return routes, logprobs


def _forward_backward(
    model: Any, arm: Arm, batch: dict[str, Any], routes: Any, rollout: Tensor, step: int
) -> tuple[_Step, Any]:
    """One step's gradients, its figures, and the `Routes` that it was trained with."""
    with contextlib.ExitStack() as stack:
        maps = stack.enter_context(_routed(model))
        logits = stack.enter_context(_logits(model))
        session = None
        if arm.replay:
            replay = r3patch.replay(model, [routes], measure=True, step=step)
            session = stack.enter_context(replay)
        if arm.reaches_mtp:
            stack.enter_context(_reach_mtp(model, routes))
        loss = model(**batch)
        gap = policy_gap(-loss.detach(), rollout)
        if session is not None:
            session.note(**gap.as_dict())
        loss.mean().backward()
    columns = [maps[layer].nonzero()[:, 1].view(-1, routes.topk) for layer in routes.layers]
    trained = r3patch.Routes(torch.stack(columns, 1), routes.layers, num_experts=routes.num_experts)
    mtp_loss = float(_mtp_loss(logits[0], batch["labels"]))
    return _Step(mtp_loss, gap, route_mismatch(trained, routes)), trained


def _point(step: int, model: Any, engine: Any, since: list[_Step]) -> Point:
    engine.load_state_dict(model.state_dict())
    accepted, served_loss = serve(engine)
    if not since:
        return Point(step, accepted, served_loss, math.nan, math.nan, math.nan)
    gaps, mismatches = [taken.gap for taken in since], [taken.mismatch for taken in since]
    return Point(
        step,
        accepted,
        served_loss,
        sum(taken.trained_loss for taken in since) / len(since),
        gaps[0].merge(*gaps[1:]).mean_abs,
        mismatches[0].merge(*mismatches[1:]).mismatch,
    )


def serve(engine: Any) -> tuple[float, float]:
    """The share of MTP drafts that are accepted, and the MTP loss, as an engine would run them.

    At position t the MTP layer sees the text up to t + 1 and drafts token t + 2; it is accepted
    where the main model, at t + 1, finds the same token likeliest.
    """
    batch = models.whole_text()
    with torch.no_grad(), models.Products(), _logits(engine) as logits:
        engine(**batch)
    draft, main = logits
    accepted = (draft.argmax(-1)[:-1] == main.argmax(-1)[1:]).float().mean()
    return float(accepted), float(_mtp_loss(draft, batch["labels"]))


def _mtp_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits ``[LENGTH, batch, vocabulary]``; the last position has no token to draft."""
    return functional.cross_entropy(logits[:-1].float().flatten(0, 1), labels.t()[1:].flatten())


@contextmanager
def _logits(model: Any) -> Iterator[list[Tensor]]:
    """Collects the logits of MTP, then of the main model.

    Copies, because Megatron's cross-entropy writes into its logits.
    """
    found: list[Tensor] = []
    handle = model.output_layer.register_forward_hook(
        lambda module, args, output: found.append(output[0].detach().clone())
    )
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _routed(model: Any) -> Iterator[dict[int, Tensor]]:
    """Collects what main routers really do: the routing map of each layer number."""
    maps: dict[int, Tensor] = {}
    handles = []
    for info in r3patch.routers(model, "main"):
        note = lambda module, args, output, layer=info.layer_number: maps.update(  # noqa: E731
            {layer: output[1].detach()}
        )
        handles.append(info.module.register_forward_hook(note))
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _reach_mtp(model: Any, routes: Any) -> Iterator[None]:
    """Give the MTP router the rows of the first MoE layer, as replay without labels does.

    From Megatron 0.17 on MTP layer 1 and decoder layer 1 have the same layer number. The replay is
    Megatron's own `RouterReplay`.
    """
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    (info,) = r3patch.routers(model, "mtp")
    native, tap = RouterReplay(), info.module.router_replay
    RouterReplay.global_router_replay_instances.remove(native)
    native.set_target_indices(routes.experts[:, 0].long())
    native.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    info.module.router_replay = native
    try:
        yield
    finally:
        info.module.router_replay = tap


def _excerpt(batch: dict[str, Any], rollout: Any, trained: Any) -> Excerpt:
    """The `SHOWN` tokens of the batch in which most rows differ."""
    samples = batch["input_ids"].shape[0]
    layers, topk = len(rollout.layers), rollout.topk
    # Rows are in the router's order, [LENGTH, samples].
    shape = (models.LENGTH, samples, layers, topk)
    ours, theirs = (
        routes.experts.long().sort(-1).values.view(shape).transpose(0, 1)
        for routes in (trained, rollout)
    )
    differs = (ours != theirs).any(-1)  # [samples, LENGTH, layers]
    windows = differs.any(-1).unfold(1, SHOWN, 1).sum(-1)  # [samples, starts]
    sample, start = divmod(int(windows.argmax()), windows.shape[1])
    differences = []
    for place, layer in differs[sample, start : start + SHOWN].nonzero().tolist():
        chosen = set(theirs[sample, start + place, layer].tolist())
        own = set(ours[sample, start + place, layer].tolist())
        differences.append(
            Difference(
                place,
                rollout.layers[layer],
                tuple(sorted(chosen - own)),
                tuple(sorted(own - chosen)),
            )
        )
    tokens = batch["input_ids"][sample, start : start + SHOWN].tolist()
    share = float(differs.any(-1).float().mean())
    return Excerpt(bytes(tokens).decode("latin-1"), tuple(differences), share)
