"""What the arms of the demo are and what they come to; no torch, so that a worker can send it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: Where all arms begin; `model.pretrain` made them.
WEIGHTS = Path(__file__).with_name("weights.safetensors")


@dataclass(frozen=True)
class Arm:
    """One way to train on."""

    name: str
    replay: bool = True
    reaches_mtp: bool = False  # the first MoE layer's rows go to the MTP router too
    trains_mtp: bool = True


PLAIN = Arm("no replay", replay=False)
REPLAY = Arm("replay")
LEAK = Arm("replay reaches MTP", reaches_mtp=True)
FROZEN = Arm("replay, MTP frozen", trains_mtp=False)
ARMS = (PLAIN, REPLAY, LEAK, FROZEN)


@dataclass(frozen=True)
class Point:
    """What was measured after ``step`` steps; what comes from training is nan at step 0."""

    step: int
    accepted: float  # of the served MTP drafts, by the main model, both greedy
    served_loss: float  # of MTP, nats per token
    trained_loss: float  # of MTP in the trainer's own forward, since the point before
    gap: float  # mean |log p(trainer) - log p(rollout)|, since the point before
    mismatch: float  # of the trainer's router calls with the rollout's, since the point before


@dataclass(frozen=True)
class Difference:
    """A token that the trainer, without replay, sends to other experts than the rollout did."""

    place: int  # in the shown text
    layer: int
    rollout: tuple[int, ...]  # only there
    trainer: tuple[int, ...]


@dataclass(frozen=True)
class Excerpt:
    """A few tokens of the last batch, a character each."""

    text: str
    differences: tuple[Difference, ...]
    share: float  # of the batch's tokens with a difference in a layer


Curves = dict[str, list[Point]]


def change(points: list[Point]) -> float:
    """In accepted drafts, from the first point to the last, in percentage points."""
    return 100 * (points[-1].accepted - points[0].accepted)
