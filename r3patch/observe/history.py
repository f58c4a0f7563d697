"""What a run did: its sessions put together by phase, layer and training step."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from r3patch.labels.scope import MTP
from r3patch.observe import reader, trace
from r3patch.observe.reader import Load, Session
from r3patch.observe.stats import COUNTED, RouterStats

Counts = dict[str, float]


@dataclass(frozen=True)
class History:
    """The sessions of a run, or of one phase of it.

    Figures are sums over ranks and sessions, for those who look at the whole; what is good or bad
    is judged session by session, in `r3patch.observe.verdict`.
    """

    sessions: tuple[Session, ...]  # a step that a resumed run did again is here once
    files: tuple[str, ...] = ()
    unreadable: Counter[str] = field(default_factory=Counter)  # "file: why" -> lines
    truncated: bool = False
    numbered: bool = True  # False: the runs gave no steps, so sessions have their order instead

    @cached_property
    def phases(self) -> dict[str, History]:
        """By the name of the sessions, in the order of their first."""
        names = dict.fromkeys(session.name for session in self.replays)
        return {
            name: replace(self, sessions=tuple(s for s in self.sessions if s.name == name))
            for name in names
        }

    @cached_property
    def replays(self) -> list[Session]:
        return [session for session in self.sessions if session.kind == "replay"]

    @property
    def recordings(self) -> int:
        return len(self.sessions) - len(self.replays)

    @property
    def errors(self) -> list[Session]:
        return [session for session in self.sessions if session.error]

    @property
    def ranks(self) -> set[int]:
        return {session.rank for session in self.sessions}

    @property
    def versions(self) -> dict[str, str]:
        return self.sessions[-1].versions

    @cached_property
    def steps(self) -> list[int]:
        return sorted({step for layer in self.main.values() for step in layer})

    @property
    def layers(self) -> list[int]:
        return sorted(self.main)

    @cached_property
    def main(self) -> dict[int, dict[int, Counts]]:
        """Layer -> step -> the counts of its routers."""
        main: dict[int, dict[int, Counts]] = {}
        for session in self.replays:
            for router in session.main:
                steps = main.setdefault(router.layer_number or 0, {})
                _add(steps.setdefault(session.step or 0, defaultdict(float)), router)
        return main

    @cached_property
    def mtp(self) -> dict[str, Counts]:
        """Router -> its counts."""
        mtp: dict[str, Counts] = {}
        for session in self.replays:
            for router in session.routers:
                if router.scope == MTP:
                    _add(mtp.setdefault(router.name, defaultdict(float)), router)
        return mtp

    @cached_property
    def worst(self) -> dict[tuple[int, int], float]:
        """(layer, step) -> the mismatch of the session and rank with the largest one there."""
        worst: dict[tuple[int, int], float] = {}
        for session in self.replays:
            for router in session.main:
                if router.mismatch is not None:
                    place = (router.layer_number or 0, session.step or 0)
                    worst[place] = max(router.mismatch, worst.get(place, 0.0))
        return worst

    @cached_property
    def notes(self) -> dict[str, dict[int, float]]:
        """Name -> step -> number, over ranks and sessions.

        Measures of the policy gap are averaged by their tokens; others count alike.
        """
        noted: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
        for session in self.replays:
            for note, value in session.notes.items():
                measure = _measure(note)
                tokens = note.removesuffix(measure) + "tokens" if measure else ""
                weight = session.notes.get(tokens, 1.0)
                noted[note, session.step or 0].append((value, weight))
        notes: dict[str, dict[int, float]] = {}
        for (note, step), values in noted.items():
            notes.setdefault(note, {})[step] = _put_together(_measure(note), values)
        return notes

    @cached_property
    def seconds(self) -> dict[int, float]:
        """Step -> host time of its longest session."""
        seconds: dict[int, float] = {}
        for session in self.replays:
            step = session.step or 0
            seconds[step] = max(session.seconds, seconds.get(step, 0.0))
        return seconds

    @cached_property
    def loads(self) -> dict[int, dict[int, Load]]:
        """Number of experts -> layer -> rows by expert."""
        loads: dict[int, dict[int, Load]] = {}
        for session in self.sessions:
            for layer, load in session.load.items():
                known = loads.setdefault(len(load.real), {})
                known[layer] = known[layer] + load if layer in known else load
        return loads

    @cached_property
    def tokens(self) -> dict[int, tuple[int, int]]:
        """Step -> tokens that were measured, and those that differ in a layer."""
        return {step: (measured, differ) for step, (measured, differ, _) in self._tokens.items()}

    @property
    def tokens_are_bounds(self) -> bool:
        """Whether some of ``tokens`` are those of one pipeline stage only."""
        return not all(exact for _, _, exact in self._tokens.values())

    @cached_property
    def _tokens(self) -> dict[int, tuple[int, int, bool]]:
        by_stage: dict[tuple[int, str], dict[tuple[int, ...], list[Session]]] = {}
        for session in sorted(self.replays, key=lambda s: s.rank):
            if session.tokens_measured:
                stages = by_stage.setdefault((session.step or 0, session.name), {})
                stages.setdefault(session.layers, []).append(session)
        tokens: dict[int, tuple[int, int, bool]] = {}
        for (step, _), stages in sorted(by_stage.items()):
            known = tokens.get(step, (0, 0, True))
            found = _tokens_of(list(stages.values()))
            tokens[step] = (known[0] + found[0], known[1] + found[1], known[2] and found[2])
        return tokens

    def total(self, name: str) -> float:
        """A count over all main routers and steps."""
        return sum(counts[name] for layer in self.main.values() for counts in layer.values())

    def by_step(self, name: str) -> list[float]:
        """A count of all main routers, for each of ``steps``."""
        return [
            sum(layer[step][name] for layer in self.main.values() if step in layer)
            for step in self.steps
        ]

    def by_layer(self, name: str) -> list[float]:
        """A count over all steps, for each of ``layers``."""
        return [sum(c[name] for c in self.main[layer].values()) for layer in self.layers]

    def fraction(self, part: str, whole: str, layer: int, step: int) -> float:
        counts = self.main[layer].get(step)
        return counts[part] / counts[whole] if counts and counts[whole] else math.nan

    def mismatch(self, layer: int, step: int) -> float:
        return self.fraction("rows_differing", "rows_measured", layer, step)

    def overlap(self, layer: int, step: int) -> float:
        return self.fraction("experts_shared", "experts_measured", layer, step)

    def gap_series(self, measure: str) -> dict[str, dict[int, float]]:
        """The notes of a measure by their prefix: ``mean_abs`` is "", ``live_mean_abs`` "live"."""
        names = (n for n in self.notes if n == measure or n.endswith(f"_{measure}"))
        return {n.removesuffix(measure).rstrip("_"): self.notes[n] for n in names}

    def other_notes(self) -> dict[str, dict[int, float]]:
        """The notes that are no measure of the policy gap."""
        return {note: series for note, series in self.notes.items() if not _measure(note)}


def load(paths: Iterable[str]) -> History:
    """Read traces; ``run.jsonl`` stands for ``run.rank*.jsonl`` where it is no file itself.

    Raises:
        R3PatchError: a path is not there, or no file of them holds a session.
    """
    found = reader.read(paths)
    numbered = all(s.step is not None for s in found.sessions if s.kind == "replay")
    sessions = found.sessions if numbered else _number(found.sessions)
    return History(
        tuple(_latest(sessions)), tuple(found.files), found.unreadable, found.truncated, numbered
    )


def _number(sessions: Iterable[Session]) -> list[Session]:
    """Sessions without a step get their place in the order of their rank and phase."""
    seen: Counter[tuple[str, int, str]] = Counter()
    numbered = []
    for session in sessions:
        key = (session.kind, session.rank, session.name)
        numbered.append(replace(session, step=seen[key]))
        seen[key] += 1
    return numbered


def _latest(sessions: Sequence[Session]) -> list[Session]:
    """Steps that a resumed run did again count once: as the process that began last did them.

    Processes that ran side by side under one rank (none had asked torch.distributed) all count.
    """

    def key(s: Session) -> tuple[object, ...]:
        return (s.kind, s.rank, s.name, s.step)

    ordered = sorted(sessions, key=lambda s: s.time)  # stable: lines of a file keep their order
    ends = {s.process: place for place, s in enumerate(ordered)}
    begins = {s.process: len(ordered) - place for place, s in enumerate(reversed(ordered), 1)}
    last: dict[tuple[object, ...], int] = {}
    for s in ordered:
        last[key(s)] = max(begins[s.process], last.get(key(s), 0))
    return [s for s in sessions if s.step is None or ends[s.process] >= last[key(s)]]


def _add(counts: Counts, router: RouterStats) -> None:
    for name in COUNTED:
        counts[name] += getattr(router, name)
    counts["experts_measured"] += router.rows_measured * router.topk


def _tokens_of(stages: list[list[Session]]) -> tuple[int, int, bool]:
    """Measured and differing tokens of one step, and whether they are exact.

    Each of ``stages`` has the sessions of ranks with the same layers, in the order of ranks. Those
    add up. Sessions of other layers saw the same tokens, and a token differs where it differs in
    any layer. In every order of ranks that Megatron knows, the i-th rank of one pipeline stage
    belongs to the i-th of the next. Where the traces do not fit together so, the stage that
    differs most is a lower bound.
    """
    sums = [(sum(s.tokens_measured for s in g), sum(s.tokens_differing for s in g)) for g in stages]
    if len(stages) == 1:
        return (*sums[0], True)
    if len({len(stage) for stage in stages}) == 1:
        merged = [_merged(sessions) for sessions in zip(*stages, strict=True)]
        exact = [codes for codes in merged if codes is not None]
        if len(exact) == len(merged):
            differing = sum(codes.count(2) + codes.count(3) for codes in exact)
            return sum(len(codes) - codes.count(0) for codes in exact), differing, True
    return (*max(sums, key=lambda pair: pair[1] / pair[0]), False)


def _merged(sessions: Sequence[Session]) -> bytes | None:
    """The codes of ``ReplayStats.tokens`` combined by "or"; None if they are of other tokens."""
    codes = [trace.unpack_tokens(s.tokens) for s in sessions if s.tokens is not None]
    if len(codes) < len(sessions) or len({len(part) for part in codes}) != 1:
        return None
    merged = 0
    for part in codes:
        merged |= int.from_bytes(part, "little")
    return merged.to_bytes(len(codes[0]), "little")


#: The measures of metrics.PolicyGap, by which notes are recognised.
_GAP = ("mean_abs", "mean_squared", "k1", "k3", "above_2", "above_5", "max_abs", "tokens")


def _measure(note: str) -> str | None:
    """``mean_abs`` of the notes ``mean_abs`` and ``live_mean_abs``."""
    return next((m for m in _GAP if note == m or note.endswith(f"_{m}")), None)


def _put_together(measure: str | None, values: list[tuple[float, float]]) -> float:
    if measure == "tokens":
        return sum(value for value, _ in values)
    kept = [(value, weight) for value, weight in values if weight]  # the mean of no token is nan
    if measure == "max_abs":
        return max((value for value, _ in kept), default=math.nan)
    total = sum(weight for _, weight in kept)
    return sum(value * weight for value, weight in kept) / total if total else math.nan
