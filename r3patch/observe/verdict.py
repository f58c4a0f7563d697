"""Whether a run is good, judged session by session and rank by rank.

Nothing is summed before it is judged: a rank that replays the wrong rows would vanish among
hundreds of healthy ones.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from r3patch.labels.scope import MTP
from r3patch.observe.history import History
from r3patch.observe.numerals import compact, percent, plural, some, spans
from r3patch.observe.reader import Session
from r3patch.observe.stats import RouterStats
from r3patch.rows.overlap import suspicious_overlap

#: Rows below which an overlap says little: with top-1 each row is all or nothing.
_MIN_ROWS = 16
#: Recompute may differ from its forward in near-ties, which are rare; a wrong match is not.
_RECOMPUTE_BOUND = 0.01
_RECOMPUTE_TIES = 2


Kind = Literal["good", "bad", "attention", "unknown"]


@dataclass(frozen=True)
class Check:
    """A question about the run and its answer: True is good, None is unknown, or ``moot``."""

    question: str
    good: bool | None
    answer: str
    shown_in: str
    moot: bool = False  # the run has nothing that it asks about
    sure: bool = True  # False: what is not good may be so on purpose, somebody has to look

    @property
    def kind(self) -> Kind:
        if self.good is False:
            return "bad" if self.sure else "attention"
        return "good" if self.good else "unknown"


@dataclass(frozen=True)
class Verdict:
    """The run in one line: a word, and what is behind it."""

    kind: Kind
    word: str
    reason: str

    @property
    def good(self) -> bool:
        return self.kind == "good"

    def __str__(self) -> str:
        return f"{self.word} {self.reason}"


@dataclass(frozen=True)
class Judged:
    """A measured session of a rank. ``unrelated`` are the layers whose routes are of other rows."""

    session: Session
    rows: int
    mismatch: float
    overlap: float
    unrelated: tuple[int, ...]


def verdict(found: Sequence[Check]) -> Verdict:
    """Good where no check is bad and one is good; says why not, or what nobody looked at."""
    bad = sorted((check for check in found if check.good is False), key=lambda c: not c.sure)
    if bad:
        kind, more = bad[0].kind, ""
        if len(bad) > 1:
            more = f" And {plural(len(bad) - 1, 'more fault')}, below."
        word = "Not good." if bad[0].sure else "Attention."
        return Verdict(kind, word, f"{bad[0].question} {bad[0].answer}{more}")
    unknown = [check.question for check in found if check.good is None and not check.moot]
    if unknown:
        return Verdict("good", "Good, as far as was looked.", f"Unknown: {' '.join(unknown)}")
    return Verdict("good", "Good.", "Every session of every rank stands the checks below.")


def checks(history: History) -> list[Check]:
    """The questions that a reader has, answered from the numbers."""
    return [
        _check_reached(history),
        _check_tokens(history),
        _check_related(history),
        _check_alarm(history),
        _check_mtp(history),
        _check_recompute(history),
        _check_errors(history),
        _check_complete(history),
    ]


def judged(history: History) -> list[Judged]:
    """Every measured session, the least related first."""
    experts = _num_experts(history)
    found = []
    for session in history.replays:
        routers = [router for router in session.main if router.rows_measured]
        if routers:
            rows = sum(router.rows_measured for router in routers)
            differing = sum(router.rows_differing for router in routers)
            unrelated = tuple(sorted(_unrelated(session, routers, experts)))
            found.append(Judged(session, rows, differing / rows, _overlap(routers), unrelated))
    return sorted(found, key=lambda j: (not j.unrelated, j.overlap))


def _unrelated(
    session: Session, routers: list[RouterStats], experts: dict[tuple[str, int], int]
) -> set[int]:
    """Layers whose rows Megatron would hardly have chosen; those of few rows are pooled."""
    odd = set()
    few = [router for router in routers if router.rows_measured < _MIN_ROWS]
    groups = [[router] for router in routers if router.rows_measured >= _MIN_ROWS]
    if sum(router.rows_measured for router in few) >= _MIN_ROWS:
        groups.append(few)
    for group in groups:
        bounds = []
        for router in group:
            layer = router.layer_number or 0
            load = session.load.get(layer)
            number = len(load.real) if load else experts.get((session.name, layer))
            bounds.append(suspicious_overlap(router.topk, number) if number else 0.5)
        if _overlap(group) < min(bounds):
            odd |= {router.layer_number or 0 for router in group}
    return odd


def _overlap(routers: list[RouterStats]) -> float:
    whole = sum(router.rows_measured * router.topk for router in routers)
    return sum(router.experts_shared for router in routers) / whole


def _num_experts(history: History) -> dict[tuple[str, int], int]:
    """Of a phase and layer, for sessions whose own record has no expert load."""
    return {
        (session.name, layer): len(load.real)
        for session in history.sessions
        for layer, load in session.load.items()
    }


def _check_reached(history: History) -> Check:
    question, where = "Did every main router replay?", "Rows by source"
    uncalled: dict[str, list[Session]] = defaultdict(list)
    without: dict[int, list[Session]] = defaultdict(list)
    for session in history.replays:
        called = any(router.forward_calls for router in session.main)
        for router in session.main:
            if router.hash_routed:
                continue
            # A refused session called none; that is not this router's fault.
            if not router.forward_calls and (called or not session.error):
                uncalled[router.name].append(session)
            elif not router.rows_replayed and not session.error:
                without[router.layer_number or 0].append(session)
    if uncalled:
        names = some([f"{name} ({_sessions(s)})" for name, s in uncalled.items()])
        text = f"Megatron's top-k was never called by {names}: an orphaned or bypassed router."
        return Check(question, False, text, where)
    if without:
        sessions = [session for found in without.values() for session in found]
        text = f"No row of layers {spans(without)} had routes at {_sessions(sessions)}."
        return Check(question, False, text, where)
    if not history.replays:
        return Check(question, None, "There is no replay session here.", where)
    if not history.main:
        began = [session for session in history.replays if not session.error]
        text = "The traces hold no main router." if began else "No session began."
        return Check(question, False if began else None, text, where)
    rows = int(history.total("rows_replayed"))
    text = (
        f"{len(history.main)} layers, {rows:,} rows in {plural(len(history.replays), 'session')}."
    )
    return Check(question, True, text, where)


def _check_related(history: History) -> Check:
    """Shifted by a layer, or stale: both look like routes of something else."""
    question = "Are the routes those of these tokens, layers and weights?"
    where = "Mismatch by layer and step"
    measured = judged(history)
    if not measured:
        return Check(question, None, "Not measured: open sessions with measure=True.", where)
    odd = [found for found in measured if found.unrelated]
    if not odd:
        if sum(found.rows for found in measured) < _MIN_ROWS:
            return Check(question, None, "Too few rows were measured to say.", where)
        overlap = history.total("experts_shared") / history.total("experts_measured")
        return Check(question, True, f"They share {percent(overlap)} of the live experts.", where)
    layers = {layer for found in odd for layer in found.unrelated}
    worst = f"Worst: {odd[0].session}, {percent(odd[0].overlap)} of the experts are shared."
    scope, cause = _pattern([o.session for o in odd], [found.session for found in measured])
    text = f"Hardly, in layers {spans(layers)}, {scope}. {cause} {worst}"
    if len(history.phases) > 1:
        where += f", {odd[0].session.name}"
    return Check(question, False, text, where)


def _check_tokens(history: History) -> Check:
    question, where = "Do the rows belong to the tokens that the model got?", "Tokens and the alarm"
    wrong = [session for session in history.replays if session.tokens_wrong]
    if wrong:
        worst = max(wrong, key=lambda s: s.tokens_wrong / s.tokens_checked)
        text = (
            f"Rows of other tokens at {_sessions(wrong)}. Worst: {worst}, {worst.tokens_wrong:,} "
            f"of {worst.tokens_checked:,} tokens."
        )
        return Check(question, False, text, where)
    checked = sum(session.tokens_checked for session in history.replays)
    if not checked:
        reasons = [check.why_not for s in history.replays for check in s.token_checks]
        why = f": {Counter(reasons).most_common(1)[0][0]}" if reasons else ""
        return Check(question, None, f"None was compared{why}.", where, moot=True)
    some_did = sum(bool(session.tokens_checked) for session in history.replays)
    text = f"All {checked:,} that were compared, in {some_did} of "
    return Check(question, True, f"{text}{plural(len(history.replays), 'session')}.", where)


def _check_alarm(history: History) -> Check:
    question, where = "Was the alarm silent?", "Tokens and the alarm"
    heard = [s for s in history.replays if s.agreement and s.agreement.kappa is not None]
    rang = [session for session in history.replays if session.alarmed]
    if rang:
        worst = min(rang, key=lambda session: session.kappa)
        text = (
            f"It rang at {_sessions(rang)}: the routes hardly are the model's own. Worst: {worst}, "
            f"{worst.kappa:.2f} of 1."
        )
        return Check(question, False, text, where, sure=False)
    if not heard:
        return Check(question, None, "It looked at nothing.", where, moot=True)
    least = min(session.kappa for session in heard)
    text = f"The first rows agree with Megatron's choice by {least:.2f} or more, of 1."
    return Check(question, True, text, where)


def _pattern(odd: Sequence[Session], measured: Sequence[Session]) -> tuple[str, str]:
    """Where the bad sessions are among the measured ones, and what that looks like."""
    ranks, names = {s.rank for s in odd}, {s.name for s in odd}
    steps = {s.step or 0 for s in odd}
    beside = [s for s in measured if (s.step or 0) in steps]
    some_ranks = ranks != {s.rank for s in beside if s.layers in {o.layers for o in odd}}
    some_names = names != {s.name for s in beside}
    scope = _steps(steps)
    if some_ranks:
        scope += f", on rank{'s' * (len(ranks) > 1)} {spans(ranks)} only"
    if some_names:
        scope += f", in {some(sorted(names))} only"
    if steps != {s.step or 0 for s in measured}:
        return scope, "At some steps only: stale rows, of other tokens or of an earlier rollout."
    if some_ranks:
        return scope, "On some ranks only: rows placed for another rank, or of its samples."
    if len(odd) < len(beside):
        return scope, "In some sessions of a step only: rows of another microbatch."
    cause = "columns shifted by a layer, misplaced tokens, or other weights"
    return scope, f"At every measured step: {cause}."


def _check_mtp(history: History) -> Check:
    question, where = "Were MTP routers left alone?", "MTP routers"
    if not history.mtp:
        return Check(question, None, "The model has none.", where, moot=True)
    touched: Counter[str] = Counter()
    for session in history.replays:
        for router in session.routers:
            if router.scope == MTP and router.rows_replayed:
                touched[f"{router.name} ({session})"] += router.rows_replayed
    if touched:
        names = some([name for name, _ in touched.most_common()])
        return Check(question, False, f"Rows were replayed by {names}.", where)
    calls = int(sum(counts["forward_calls"] for counts in history.mtp.values()))
    return Check(question, True, f"{calls:,} calls took Megatron's own top-k.", where)


def _check_recompute(history: History) -> Check:
    question, where = "Did recompute route as its forward did?", "Key figures"
    rows = history.total("recompute_rows_measured")
    if not rows:
        calls = int(history.total("recompute_calls"))
        text = f"{calls:,} recompute calls, not measured." if calls else "There was no recompute."
        return Check(question, None, text, where, moot=not calls)
    bad = []
    for session in history.replays:
        own = sum(router.recompute_rows_measured for router in session.main)
        differing = sum(router.recompute_rows_differing for router in session.main)
        if differing > max(_RECOMPUTE_TIES, _RECOMPUTE_BOUND * own):
            bad.append((differing / own, session))
    part = history.total("recompute_rows_differing") / rows
    text = f"{part:.2%} of {compact(rows)} live rows differ from their forward's."
    if bad:
        worst, session = max(bad, key=lambda pair: pair[0])
        text += f" Worst: {session}, {percent(worst)}."
    return Check(question, not bad, text, where)


def _check_errors(history: History) -> Check:
    question, where = "Did every session end without an error?", "Refusals and errors"
    if history.errors:
        first = history.errors[0]
        kind = first.error.type if first.error else ""
        text = f"{len(history.errors)} did not. First: {first}, {kind}."
        return Check(question, False, text, where)
    return Check(question, True, "Yes.", where)


def _check_complete(history: History) -> Check:
    question, where = "Is the trace whole?", "Provenance"
    faults = []
    if history.unreadable:
        faults.append(f"{sum(history.unreadable.values())} unreadable lines")
    if history.truncated:
        faults.append("a file reached its size limit")
    if lost := sum(session.lost for session in history.sessions):
        faults.append(f"{lost} records could not be written")
    if cut := sum("routers" in session.dropped for session in history.sessions):
        faults.append(f"{cut} records were too long for their routers")
    if history.ranks != set(range(len(history.ranks))):
        faults.append(f"only ranks {spans(history.ranks)} are here")
    text = "; ".join(faults) or f"{len(history.files)} files, no unreadable line."
    return Check(question, not faults, text[:1].upper() + text[1:], where)


def _sessions(sessions: Iterable[Session]) -> str:
    """Their steps, and their ranks and phases where there are others."""
    sessions = list(sessions)
    text = _steps({session.step or 0 for session in sessions})
    ranks = {session.rank for session in sessions}
    names = {session.name for session in sessions if session.name}
    text += f", rank{'s' * (len(ranks) > 1)} {spans(ranks)}" if ranks != {0} else ""
    return text + (f", {some(sorted(names))}" if names else "")


def _steps(steps: Collection[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {spans(steps)}"
