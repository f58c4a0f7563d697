"""Cases of the stress test: which model, which checkpoints, which schedule, which faults.

A schedule is a line of moves over numbered microbatches:

    f1      forward of microbatch 1
    f1~0    the same, its loss taken behind the first outermost part of the nest, the output dropped
    e1      forward without grad: an evaluation, which takes rows as any forward does
    b1      backward; B1 the same with retain_graph=True
    b1+2    one backward of the sum of two losses
    b1|2    two backward passes in two threads at once
    x1      the loss is dropped: microbatch 1 never sees a backward
    f1!2b   an exception before (b) or after (a) the router of layer 2, or when the gradient reaches
            its gate weights (g). The next f1 is the retry
    b1!2g   the same in backward, where it may come by in a recompute
    b1?3@2g microbatch 3 is evaluated there, inside the backward of microbatch 1
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from stack import CHECKPOINTS, ROUTINGS, Nest, leaves

__all__ = ["GPT", "Case", "Move", "draw", "simpler"]

#: Megatron's own recompute of a whole GPT model, by name.
GPT: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "full_first": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 2,
    },
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "moe_attention": {
        "recompute_granularity": "selective",
        "recompute_modules": ["moe", "core_attn"],
    },
}

LAYERS = 3
_MOVE = re.compile(r"([febBx])(\d+)(?:~(\d+))?(?:([+|])(\d+))?(?:(?:!|\?(\d+)@)(\d)([bag]))?")


@dataclass(frozen=True)
class Move:
    """One word of a schedule."""

    kind: str
    microbatch: int
    tail: int | None = None  # the outermost part of the nest behind which the loss is taken
    joint: str = ""  # "+" or "|": with whom
    other: int = -1
    evaluate: int | None = None  # the microbatch to evaluate at the trip; None: raise there
    layer: int = -1  # the trip: the router's index,
    place: str = ""  # and "b", "a" or "g"; "" for none

    @classmethod
    def parse(cls, word: str) -> Move:
        match = _MOVE.fullmatch(word)
        if match is None:
            raise ValueError(f"{word!r} is no move; see the head of {__file__}")
        kind, number, tail, joint, other, evaluate, layer, place = match.groups()
        return cls(
            kind,
            int(number),
            None if tail is None else int(tail),
            joint or "",
            int(other or -1),
            None if evaluate is None else int(evaluate),
            int(layer or -1),
            place or "",
        )


@dataclass(frozen=True)
class Case:
    """All that a run depends on; ``str`` of it is JSON that `parse` takes back."""

    seed: int  # of data and rows
    routing: str  # a key of ROUTINGS
    nest: tuple[Nest, ...] | str  # of a Stack; or a key of GPT: Megatron's own model and recompute
    outer: str  # a checkpoint around the call of the whole model, or ""
    schedule: str
    gaps: float  # fraction of rows without routes
    measure: bool
    feed: bool  # each microbatch before its first forward, or all on entry
    threads: str  # "": one; "move", "microbatch": a thread of its own for each, one at a time
    missing: str = "live"
    tokens: str = ""  # a mode, the routes with the tokens that the model gets; "": without tokens
    healthy: bool = False  # the model's own routes but for one token, and alarm="raise"
    ragged: bool = False  # other gaps in other layers
    split: int = 0  # layers in the first of two chunks: those of the nest's first part; 0: one

    @property
    def options(self) -> dict[str, Any]:
        """How the session is opened."""
        return {
            "measure": self.measure,
            "missing": self.missing,
            "tokens": self.tokens or "check",
            "alarm": "raise" if self.healthy else "warn",
        }

    @property
    def moves(self) -> list[Move]:
        return [Move.parse(word) for word in self.schedule.split()]

    @property
    def microbatches(self) -> int:
        numbers = [m.microbatch for m in self.moves] + [m.evaluate or 0 for m in self.moves]
        return max(numbers) + 1

    @property
    def plain(self) -> bool:
        """No fault, no thread: what any training run may do, and must be exact."""
        return not self.threads and not set("!?|") & set(self.schedule)

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Case:
        fields = json.loads(text)
        return cls(**{**fields, "nest": _tuples(fields["nest"])})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def draw(seed: int) -> Case:
    """The case of a number."""
    rng = random.Random(seed)  # noqa: S311 - a case, no secret
    stack = rng.random() < 0.94  # a GPT model costs ten times as much
    nest = _nest(rng, range(LAYERS)) if stack else rng.choice(sorted(GPT))
    outer = rng.choice(sorted(CHECKPOINTS)) if rng.random() < 0.15 else ""
    # Megatron's forward needs the CPU context, which is the main thread's.
    threads = rng.choice(["move", "microbatch"]) if stack and rng.random() < 0.2 else ""
    parts = len(nest) if stack and not outer else 0
    # Megatron's GPT model and selective contexts run one backward for each forward.
    retain = stack and not set("ST") & set(f"{outer}{nest}")
    schedule = _schedule(rng, parts, faults=rng.random() < 0.4, retain=retain)
    case = Case(
        seed=seed,
        routing=rng.choice(sorted(ROUTINGS)),
        nest=nest,
        outer=outer,
        schedule=schedule,
        gaps=rng.choice([0.0, 0.1, 0.1, 0.5, 1.0]),
        measure=rng.random() < 0.4,
        feed=rng.random() < 0.5,
        threads=threads,
        missing=rng.choice(["live", "live", "spread"]),
        tokens=rng.choice(["", "check", "strict"]),
        healthy=rng.random() < 0.3,
        ragged=rng.random() < 0.3,
    )
    if isinstance(nest, tuple) and len(nest) > 1 and rng.random() < 0.3:
        case = replace(case, split=len(list(leaves(nest[:1]))))
    return case


def _nest(rng: random.Random, layers: Sequence[int], depth: int = 0) -> tuple[Nest, ...]:
    """The layers cut into runs, each bare or in a checkpoint, in which the same may happen."""
    parts: list[Nest] = []
    start = 0
    while start < len(layers):
        stop = rng.randint(start + 1, len(layers))
        if rng.random() < (0.75, 0.5, 0.3)[min(depth, 2)]:
            inner = _nest(rng, layers[start:stop], depth + 1) if depth < 3 else layers[start:stop]
            parts.append((rng.choice(sorted(CHECKPOINTS)), tuple(inner)))
        else:
            parts.extend(layers[start:stop])
        start = stop
    return tuple(parts)


def _schedule(rng: random.Random, parts: int, *, faults: bool, retain: bool) -> str:
    total = rng.randint(1, 4)
    words: list[str] = []
    waiting: list[int] = []  # forwards without a backward so far
    number = 0
    while number < total or waiting:
        if number < total and (not waiting or rng.random() < 0.5):
            words += _forward(rng, number, waiting, parts=parts, faults=faults)
            number += 1
            continue
        i = waiting.pop(rng.randrange(len(waiting)))
        kind = rng.random()
        if faults and kind < 0.3:
            words += _failing_backward(rng, i, retain=retain and kind > 0.15)
        elif faults and kind < 0.4 and number < total:
            words.append(f"b{i}?{number}@{_trip(rng, 'bag')}")
            number += 1
        elif faults and kind < 0.5 and waiting:
            words.append(f"b{i}|{waiting.pop()}")
        elif kind > 0.85 and waiting:
            words.append(f"b{i}+{waiting.pop()}")
        elif retain and kind > 0.7:
            words += [f"B{i}", f"b{i}"]
        else:
            words.append(f"x{i}" if 0.5 < kind < 0.55 else f"b{i}")
    return " ".join(words)


def _forward(
    rng: random.Random, number: int, waiting: list[int], *, parts: int, faults: bool
) -> list[str]:
    """A forward, perhaps at the second try, which then waits for its backward; or an evaluation."""
    if rng.random() < 0.15:
        return [f"e{number}"]
    words = []
    if faults and rng.random() < 0.3:
        words.append(f"f{number}!{_trip(rng, 'ba')}")
        if waiting and rng.random() < 0.3:  # something else before the retry
            words.append(f"b{waiting.pop()}")
    waiting.append(number)
    tail = f"~{rng.randrange(parts)}" if parts and rng.random() < 0.1 else ""
    return [*words, f"f{number}{tail}"]


def _failing_backward(rng: random.Random, number: int, *, retain: bool) -> list[str]:
    """Given up, or tried again where the graph is kept."""
    trip = _trip(rng, "bag")
    return [f"B{number}!{trip}", f"b{number}"] if retain else [f"b{number}!{trip}"]


def _trip(rng: random.Random, places: str) -> str:
    return f"{rng.randrange(LAYERS)}{rng.choice(places)}"


def simpler(case: Case) -> list[Case]:
    """Cases with one thing less, for finding the smallest one that still goes wrong."""
    words = case.schedule.split()
    numbers = sorted({move.microbatch for move in case.moves}, reverse=True)
    found = [replace(case, schedule=s) for n in numbers if (s := _without(words, n))]
    for index, word in enumerate(words):
        before, after = words[:index], words[index + 1 :]
        if "?" not in word and ("!" in word or (word[0] in "bBx" and not set("|+") & set(word))):
            found.append(replace(case, schedule=" ".join(before + after)))
        if (word[0] in "bB" and "!" in word) or "~" in word:
            plain = re.sub(r"[~!].*", "", word)
            found.append(replace(case, schedule=" ".join([*before, plain, *after])))
    found += [replace(case, threads="")] if case.threads else []
    found += [replace(case, outer="")] if case.outer else []
    found += [replace(case, measure=False)] if case.measure else []
    found += [replace(case, gaps=0.0)] if case.gaps else []
    found += [replace(case, feed=False)] if case.feed else []
    found += [replace(case, missing="live")] if case.missing != "live" else []
    found += [replace(case, tokens="")] if case.tokens else []
    found += [replace(case, healthy=False)] if case.healthy else []
    found += [replace(case, ragged=False)] if case.ragged else []
    if case.split:  # the nest says where: as it is, or whole
        return [*[c for c in found if c.schedule], replace(case, split=0)]
    if not isinstance(case.nest, str) and "~" not in case.schedule:
        found += [replace(case, nest=nest) for nest in _opened(case.nest)]
    return [smaller for smaller in found if smaller.schedule and smaller != case]


def _without(words: list[str], gone: int) -> str:
    """The schedule without a microbatch, those behind it renumbered; "" if others hang on it."""
    kept = []
    for word in words:
        move = Move.parse(word)
        others = (move.other if move.joint else None, move.evaluate)
        if gone in others or (move.microbatch == gone and others != (None, None)):
            return ""
        if move.microbatch != gone:
            kept.append(re.sub(r"(?<=[febBx+|?])\d+", lambda m: _behind(m[0], gone), word))
    return " ".join(kept)


def _behind(number: str, gone: int) -> str:
    return str(int(number) - (int(number) > gone))


def _opened(nest: tuple[Nest, ...]) -> list[tuple[Nest, ...]]:
    """The nests with one checkpoint less."""
    found: list[tuple[Nest, ...]] = []
    for index, part in enumerate(nest):
        if not isinstance(part, int):
            before, after = nest[:index], nest[index + 1 :]
            found.append((*before, *part[1], *after))
            found += [(*before, (part[0], inner), *after) for inner in _opened(part[1])]
    return found
