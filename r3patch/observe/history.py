"""What the traces of a run say: records of ranks and sessions, put together by training step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r3patch._errors import R3PatchError
from r3patch.labels.scope import MAIN, MTP
from r3patch.metrics import suspicious_overlap
from r3patch.observe import trace

Record = dict[str, Any]
Counts = dict[str, float]

_COUNTS = (
    "forward_calls",
    "recompute_calls",
    "rows_replayed",
    "rows_live",
    "rows_spread",
    "rows_measured",
    "rows_differing",
    "experts_shared",
    "recompute_rows_measured",
    "recompute_rows_differing",
)
#: Recompute may differ from its forward in near-ties, which are rare; a wrong match is not.
_RECOMPUTE_BOUND = 0.01


@dataclass(frozen=True)
class Check:
    """A question about the run and its answer: True is good, None is unknown."""

    question: str
    good: bool | None
    answer: str
    shown_in: str


@dataclass
class Load:
    """Rows by expert of one layer, summed over sessions and ranks."""

    real: list[int]
    padding: list[int]
    invalid: int = 0


@dataclass
class History:
    """The replay sessions of a run by step; without steps, by their order on each rank."""

    files: list[str] = field(default_factory=list)
    sessions: int = 0
    recordings: int = 0
    broken_lines: int = 0
    truncated: bool = False
    numbered: bool = True
    ranks: set[int] = field(default_factory=set)
    versions: dict[str, str] = field(default_factory=dict)
    main: dict[int, dict[int, Counts]] = field(default_factory=dict)  # layer -> step -> counts
    mtp: dict[str, Counts] = field(default_factory=dict)  # router -> counts
    tokens: dict[int, tuple[int, int]] = field(default_factory=dict)  # step -> measured, differing
    notes: dict[str, dict[int, float]] = field(default_factory=dict)  # name -> step -> number
    seconds: dict[int, float] = field(default_factory=dict)  # step -> of the slowest rank
    load: dict[int, Load] = field(default_factory=dict)  # layer -> rows by expert
    errors: list[Record] = field(default_factory=list)
    uncalled: dict[str, set[int]] = field(default_factory=dict)  # main router -> steps
    tokens_are_bounds: bool = False

    @property
    def steps(self) -> list[int]:
        return sorted({step for layer in self.main.values() for step in layer})

    @property
    def layers(self) -> list[int]:
        return sorted(self.main)

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


def load(paths: Iterable[str]) -> History:
    """Read traces; ``run.jsonl`` stands for ``run.rank*.jsonl`` where it is no file itself.

    Raises:
        R3PatchError: a file is no trace, or no file is there.
    """
    history = History()
    records: list[Record] = []
    for path in paths:
        for file in _files(path):
            found, broken = trace.read(file)
            history.files.append(str(file))
            history.broken_lines += broken
            records += found
    _gather(history, records)
    return history


def _files(path: str) -> list[Path]:
    whole = Path(path)
    if whole.exists():
        return [whole]
    ranks = [
        file
        for file in whole.parent.glob("*.rank*")
        if file.suffix == whole.suffix and file.stem.rpartition(".rank")[0] == whole.stem
    ]
    if not ranks:
        raise R3PatchError(
            f"there is neither {path} nor {trace.rank_path(path, 0)}: a rank writes its trace "
            "when its first session ends."
        )
    return sorted(ranks, key=lambda file: int(file.stem.rpartition(".rank")[2]))


def _gather(history: History, records: Sequence[Record]) -> None:
    history.truncated = any(record["kind"] == "truncated" for record in records)
    sessions = [record for record in records if record["kind"] in ("replay", "record")]
    if not sessions:
        raise R3PatchError("these traces hold no session.")
    history.ranks = {record["rank"] for record in sessions}
    history.versions = sessions[-1].get("versions", {})
    history.recordings = sum(record["kind"] == "record" for record in sessions)
    history.errors = [record for record in sessions if record["error"]]
    replays = [record for record in sessions if record["kind"] == "replay"]
    history.numbered = all(record["step"] is not None for record in replays)
    if not history.numbered:
        replays = _number(replays)
    replays = _latest(replays)
    history.sessions = len(replays)
    for record in replays:
        _add_routers(history, record)
    for record in [*replays, *(r for r in sessions if r["kind"] == "record")]:
        _add_load(history, record["expert_load"])
    _add_tokens(history, replays)
    _add_notes(history, replays)
    for record in replays:
        spent = sum(_number_of(value) for value in record["seconds"].values())
        history.seconds[record["step"]] = max(spent, history.seconds.get(record["step"], 0.0))


def _number(records: list[Record]) -> list[Record]:
    """Sessions without a step get their place in the order of their rank."""
    seen: dict[int, int] = defaultdict(int)
    numbered = []
    for record in records:
        numbered.append({**record, "step": seen[record["rank"]]})
        seen[record["rank"]] += 1
    return numbered


def _latest(records: list[Record]) -> list[Record]:
    """Steps that a resumed run did again count once: as the latest process did them."""
    latest: dict[tuple[int, int], Any] = {}
    for record in sorted(records, key=lambda r: float(r["time"])):
        latest[record["rank"], record["step"]] = record["process"]
    return [r for r in records if latest[r["rank"], r["step"]] == r["process"]]


def _add_routers(history: History, record: Record) -> None:
    called = any(r["forward_calls"] for r in record["routers"] if r["scope"] == MAIN)
    for router in record["routers"]:
        if router["scope"] == MTP:
            counts = history.mtp.setdefault(router["name"], defaultdict(float))
        else:
            steps = history.main.setdefault(router["layer_number"], {})
            counts = steps.setdefault(record["step"], defaultdict(float))
            # A refused session called none; that is not this router's fault.
            if not router["forward_calls"] and (called or not record["error"]):
                history.uncalled.setdefault(router["name"], set()).add(record["step"])
        for name in _COUNTS:
            counts[name] += router.get(name, 0)
        counts["experts_measured"] += router.get("rows_measured", 0) * router.get("topk", 0)
        counts["topk"] = router.get("topk", 0)


def _add_load(history: History, found: Record | None) -> None:
    if found is None:
        return
    rows = zip(found["layers"], found["real"], found["padding"], found["invalid"], strict=True)
    for layer, real, padding, invalid in rows:
        known = history.load.setdefault(layer, Load([0] * len(real), [0] * len(real)))
        known.real = [a + b for a, b in zip(known.real, real, strict=True)]
        known.padding = [a + b for a, b in zip(known.padding, padding, strict=True)]
        known.invalid += invalid


def _add_tokens(history: History, records: list[Record]) -> None:
    """Ranks of the same layers add up; those of other layers saw the same tokens.

    Whether two stages mean the same token is not in the trace, so the largest is a lower bound.
    """
    by_stage: dict[int, dict[tuple[int, ...], list[int]]] = defaultdict(dict)
    for record in records:
        stage = tuple(sorted(r["layer_number"] for r in record["routers"] if r["scope"] == MAIN))
        sums = by_stage[record["step"]].setdefault(stage, [0, 0])
        sums[0] += record["tokens_measured"]
        sums[1] += record["tokens_differing"]
    for step, stages in by_stage.items():
        measured = [(n, d) for n, d in stages.values() if n]
        if measured:
            history.tokens[step] = max(measured, key=lambda pair: pair[1] / pair[0])
            history.tokens_are_bounds |= len(measured) > 1


#: The measures of metrics.PolicyGap, by which notes are recognised.
_GAP = ("mean_abs", "mean_squared", "k1", "k3", "above_2", "above_5", "max_abs", "tokens")


def _measure(note: str) -> str | None:
    """``mean_abs`` of the notes ``mean_abs`` and ``live_mean_abs``."""
    return next((m for m in _GAP if note == m or note.endswith(f"_{m}")), None)


def _add_notes(history: History, records: list[Record]) -> None:
    """Over ranks and sessions of a step: means weighted by tokens, sums of tokens, largest max."""
    noted: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for record in records:
        for note, value in record["notes"].items():
            measure = _measure(note)
            tokens = note.removesuffix(measure) + "tokens" if measure else ""
            weight = _number_of(record["notes"].get(tokens, 1.0))
            noted[note, record["step"]].append((_number_of(value), weight))
    for (note, step), values in noted.items():
        history.notes.setdefault(note, {})[step] = _put_together(_measure(note), values)


def _put_together(measure: str | None, values: list[tuple[float, float]]) -> float:
    if measure == "tokens":
        return sum(value for value, _ in values)
    kept = [(value, weight) for value, weight in values if weight]  # the mean of no token is nan
    if measure == "max_abs":
        return max((value for value, _ in kept), default=math.nan)
    total = sum(weight for _, weight in kept)
    return sum(value * weight for value, weight in kept) / total if total else math.nan


def gap_series(history: History, measure: str) -> dict[str, dict[int, float]]:
    """The notes of a measure by their prefix: ``mean_abs`` is "", ``live_mean_abs`` "live"."""
    names = (n for n in history.notes if n == measure or n.endswith(f"_{measure}"))
    return {n.removesuffix(measure).rstrip("_"): history.notes[n] for n in names}


def other_notes(history: History) -> dict[str, dict[int, float]]:
    """The notes that are no measure of the policy gap."""
    return {note: series for note, series in history.notes.items() if not _measure(note)}


def _number_of(value: Any) -> float:
    return float(value)  # of "nan", "inf" and "-inf" too, which JSON has as text


def checks(history: History) -> list[Check]:
    """The questions that a reader of the page has, answered from the numbers."""
    return [
        _check_reached(history),
        _check_related(history),
        _check_mtp(history),
        _check_recompute(history),
        _check_errors(history),
        _check_complete(history),
    ]


def _check_reached(history: History) -> Check:
    question, where = "Did every main router replay?", "Rows by source"
    if history.uncalled:
        names = _some([f"{name} ({_steps(s)})" for name, s in history.uncalled.items()])
        text = f"Megatron's top-k was never called by {names}: an orphaned or bypassed router."
        return Check(question, False, text, where)
    refused = {record["step"] for record in history.errors}
    without = [
        (layer, step)
        for layer, steps in history.main.items()
        for step, counts in steps.items()
        if not counts["rows_replayed"] and step not in refused
    ]
    if without:
        layers, steps = ({pair[place] for pair in without} for place in (0, 1))
        text = f"No row of layers {spans(layers)} had routes at {_steps(steps)}."
        return Check(question, False, text, where)
    if not history.main:
        return Check(question, False, "The traces hold no main router.", where)
    rows = int(history.total("rows_replayed"))
    text = f"{len(history.main)} layers, {rows:,} rows in {history.sessions:,} sessions."
    return Check(question, True, text, where)


def _check_related(history: History) -> Check:
    """Shifted by a layer, or stale: both look like routes of something else."""
    question = "Are the routes those of these tokens, layers and weights?"
    where = "Mismatch by layer and step"
    if not history.total("rows_measured"):
        return Check(question, None, "Not measured: open sessions with measure=True.", where)
    odd: dict[int, list[int]] = defaultdict(list)
    measured = set()
    for layer in history.layers:
        for step, counts in history.main[layer].items():
            if not counts["rows_measured"]:
                continue
            measured.add(step)
            if history.overlap(layer, step) < _bound(history, layer, int(counts["topk"])):
                odd[step].append(layer)
    if not odd:
        overlap = history.total("experts_shared") / history.total("experts_measured")
        return Check(question, True, f"They share {overlap:.1%} of the live experts.", where)
    layers = {layer for found in odd.values() for layer in found}
    cause = (
        "At every measured step: columns shifted by a layer, misplaced tokens, or other weights."
        if set(odd) == measured
        else "At some steps only: stale rows, of other tokens or of an earlier rollout."
    )
    steps = _steps(odd)
    return Check(question, False, f"Hardly, in layers {spans(layers)}, {steps}. {cause}", where)


def _bound(history: History, layer: int, topk: int) -> float:
    known = history.load.get(layer)
    return suspicious_overlap(topk, len(known.real)) if known else 0.5


def _check_mtp(history: History) -> Check:
    question, where = "Were MTP routers left alone?", "MTP routers"
    if not history.mtp:
        return Check(question, None, "The model has none.", where)
    touched = [name for name, counts in history.mtp.items() if counts["rows_replayed"]]
    if touched:
        return Check(question, False, f"Rows were replayed by {_some(touched)}.", where)
    calls = int(sum(counts["forward_calls"] for counts in history.mtp.values()))
    return Check(question, True, f"{calls:,} calls took Megatron's own top-k.", where)


def _check_recompute(history: History) -> Check:
    question, where = "Did recompute route as its forward did?", "Key figures"
    rows = history.total("recompute_rows_measured")
    if not rows:
        calls = int(history.total("recompute_calls"))
        text = f"{calls:,} recompute calls, not measured." if calls else "There was no recompute."
        return Check(question, None, text, where)
    part = history.total("recompute_rows_differing") / rows
    text = f"{part:.2%} of {int(rows):,} live rows differ from their forward's."
    return Check(question, part <= _RECOMPUTE_BOUND, text, where)


def _check_errors(history: History) -> Check:
    question, where = "Did every session end without an error?", "Refusals and errors"
    if history.errors:
        return Check(question, False, f"{len(history.errors)} did not.", where)
    return Check(question, True, "Yes.", where)


def _check_complete(history: History) -> Check:
    question, where = "Is the trace whole?", "Provenance"
    faults = []
    if history.broken_lines:
        faults.append(f"{history.broken_lines} unreadable lines")
    if history.truncated:
        faults.append("a file reached its size limit")
    if history.ranks != set(range(len(history.ranks))):
        faults.append(f"only ranks {spans(history.ranks)} are here")
    text = "; ".join(faults) or f"{len(history.files)} files, no unreadable line."
    return Check(question, not faults, text[:1].upper() + text[1:], where)


def _steps(steps: Collection[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {spans(steps)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers with runs put together: 2, 4-61."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
