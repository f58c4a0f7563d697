"""Reading traces: files to sessions, and why the rest of their lines could not be read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from r3patch._errors import R3PatchError
from r3patch.labels.scope import MAIN, MTP
from r3patch.observe import trace
from r3patch.observe.stats import COUNTED, RouterStats, TokenCheck

#: JSON readers of other languages have doubles; a count of rows beyond them is none.
_MOST = 1 << 53
_MAX_CHARACTERS = 10_000


class Failure(NamedTuple):
    """What refused or ended a session."""

    type: str
    text: str


class Agreed(NamedTuple):
    """How far a session's first rows agreed with Megatron's own choice."""

    kappa: float | None  # None: too few rows to say
    chance: float
    rows: int
    alarmed: bool


@dataclass(frozen=True)
class Load:
    """Rows by expert of one layer."""

    real: list[int]
    padding: list[int]
    invalid: int

    def __add__(self, other: Load) -> Load:
        real, padding = (
            [a + b for a, b in zip(ours, theirs, strict=True)]
            for ours, theirs in ((self.real, other.real), (self.padding, other.padding))
        )
        return Load(real, padding, self.invalid + other.invalid)


@dataclass(frozen=True)
class Session:
    """A line of a trace: one session on one rank. docs/observe.md has the fields."""

    kind: str
    time: float
    process: str
    rank: int
    versions: dict[str, str]
    step: int | None
    name: str
    routers: tuple[RouterStats, ...]
    tokens_measured: int
    tokens_differing: int
    tokens: str | None
    token_checks: tuple[TokenCheck, ...]
    agreement: Agreed | None
    seconds: float
    notes: dict[str, float]
    load: dict[int, Load]
    error: Failure | None
    dropped: tuple[str, ...]
    lost: int

    @property
    def main(self) -> list[RouterStats]:
        return [router for router in self.routers if router.scope == MAIN]

    @property
    def tokens_checked(self) -> int:
        return sum(check.checked for check in self.token_checks)

    @property
    def tokens_wrong(self) -> int:
        """Rows whose token is not the one that the model got."""
        return sum(check.wrong for check in self.token_checks)

    @property
    def alarmed(self) -> bool:
        return self.agreement is not None and self.agreement.alarmed

    @property
    def kappa(self) -> float:
        """How far its first rows agreed with Megatron's own choice; 1 where nobody can say."""
        agreed = self.agreement
        return 1.0 if agreed is None or agreed.kappa is None else agreed.kappa

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer numbers of its main routers, ascending."""
        return tuple(sorted(r.layer_number for r in self.main if r.layer_number is not None))

    def __str__(self) -> str:
        step = "" if self.step is None else f", step {self.step}"
        return f"rank {self.rank}{step}{f', {self.name}' if self.name else ''}"


@dataclass
class Traces:
    """Everything that some files hold."""

    files: list[str] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    unreadable: Counter[str] = field(default_factory=Counter)  # "file: why" -> lines
    truncated: bool = False


def read(paths: Iterable[str]) -> Traces:
    """Read traces; ``run.jsonl`` stands for ``run.rank*.jsonl`` where it is no file itself.

    Raises:
        R3PatchError: a path is not there, or no file of them holds a session.
    """
    found = Traces()
    refused: list[Exception] = []
    for file in [file for path in paths for file in _files(path)]:
        found.files.append(str(file))
        try:
            records, broken = trace.read(file)
        except (OSError, R3PatchError) as error:
            refused.append(error)
            found.unreadable[f"{file.name}: no trace"] += 1
            continue
        found.unreadable[f"{file.name}: cut short, or no line of a trace"] += broken
        for record in records:
            try:
                if record.get("kind") == "truncated":
                    found.truncated = True
                else:
                    found.sessions.append(parse(record))
            except (ValueError, RecursionError) as error:
                found.unreadable[f"{file.name}: {error}"] += 1
    found.unreadable = +found.unreadable
    if not found.sessions:
        if refused:
            raise R3PatchError(str(refused[0]))
        why = "; ".join(f"{text} ({lines})" for text, lines in found.unreadable.most_common(3))
        raise R3PatchError(f"these traces hold no session. {why}".rstrip())
    return found


def _files(path: str) -> list[Path]:
    whole = Path(path)
    if whole.exists():
        return [whole]
    pattern = rf"{re.escape(whole.stem)}\.rank(\d{{1,9}}){re.escape(whole.suffix)}"
    ranks = {
        int(match[1]): file
        for file in (whole.parent.iterdir() if whole.parent.is_dir() else ())
        if (match := re.fullmatch(pattern, file.name))
    }
    if not ranks:
        raise R3PatchError(
            f"there is neither {path} nor {trace.rank_path(path, 0)}: a rank writes its trace "
            "when its first session ends."
        )
    return [ranks[rank] for rank in sorted(ranks)]


def parse(record: dict[str, Any]) -> Session:
    """A record as a session.

    Raises:
        ValueError: a field is not what docs/observe.md says; names it.
    """
    get = record.get
    if get("kind") not in ("replay", "record"):
        raise ValueError(f"kind is {_short(get('kind'))}")
    error = get("error")
    session = Session(
        kind=get("kind", ""),
        time=_number(get("time"), "time"),
        process=_text(get("process"), "process"),
        rank=_count(get("rank"), "rank"),
        versions={
            _text(name, "a version"): _text(version, f"the version of {_short(name)}")
            for name, version in _dict(get("versions"), "versions").items()
        },
        step=None if get("step") is None else _whole(get("step"), "step"),
        name="" if get("name") is None else _text(get("name"), "name"),
        routers=tuple(_router(router) for router in _list(get("routers"), "routers")),
        tokens_measured=_count(get("tokens_measured"), "tokens_measured"),
        tokens_differing=_count(get("tokens_differing"), "tokens_differing"),
        tokens=None if get("tokens") is None else _text(get("tokens"), "tokens", trace.MAX_TOKENS),
        # Neither is in traces of r3patch 0.1.
        token_checks=tuple(map(_token_check, _list(get("token_checks", []), "token_checks"))),
        agreement=None if get("agreement") is None else _agreed(get("agreement")),
        seconds=sum(
            _number(value, "seconds") for value in _dict(get("seconds"), "seconds").values()
        ),
        notes={
            _text(name, "a note"): _number(value, f"note {_short(name)}")
            for name, value in _dict(get("notes"), "notes").items()
            if value is not None
        },
        load={} if get("expert_load") is None else _load(get("expert_load")),
        error=None if error is None else _failure(_dict(error, "error")),
        dropped=tuple(_text(name, "dropped") for name in _list(get("dropped", []), "dropped")),
        lost=_count(get("lost", 0), "lost"),
    )
    _check_tokens(session)
    return session


def _router(value: Any) -> RouterStats:
    get = _dict(value, "a router").get
    scope, layer = get("scope"), get("layer_number")
    if scope not in (MAIN, MTP):
        raise ValueError(f"scope is {_short(scope)}")
    if scope == MAIN or layer is not None:
        _count(layer, "layer_number")
    router = RouterStats(
        _text(get("name"), "a router's name"),
        _count(get("chunk"), "chunk"),
        scope,
        layer,
        topk=_count(get("topk"), "topk"),
        hash_routed=get("hash_routed") is True,  # not in traces of r3patch 0.1
        **{name: _count(get(name), name) for name in COUNTED},
    )
    for part, whole in (
        ("rows_differing", router.rows_measured),
        ("experts_shared", router.rows_measured * router.topk),
        ("recompute_rows_differing", router.recompute_rows_measured),
    ):
        if getattr(router, part) > whole:
            raise ValueError(f"{part} is {getattr(router, part)}, more than there are")
    if router.rows_measured and not router.topk:
        raise ValueError("topk is 0")
    return router


def _token_check(value: Any) -> TokenCheck:
    get = _dict(value, "a token check").get
    checked, wrong = _count(get("checked"), "checked"), _count(get("wrong"), "wrong")
    if wrong > checked:
        raise ValueError(f"wrong is {wrong}, more than there are")
    return TokenCheck(
        _count(get("chunk"), "chunk"), checked, _text(get("why_not"), "why_not"), wrong
    )


def _agreed(value: Any) -> Agreed:
    get = _dict(value, "agreement").get
    kappa, alarmed = get("kappa"), get("alarmed")
    if not isinstance(alarmed, bool):
        raise ValueError(f"alarmed is {_short(alarmed)}")
    return Agreed(
        None if kappa is None else _number(kappa, "kappa"),
        _number(get("chance"), "chance"),
        _count(get("rows"), "rows"),
        alarmed,
    )


def _load(value: Any) -> dict[int, Load]:
    found = _dict(value, "expert_load")
    parts = [_list(found.get(name), name) for name in ("layers", "real", "padding", "invalid")]
    loads = {}
    for layer, real, padding, invalid in zip(*parts, strict=True):
        load = Load(_counts(real, "real"), _counts(padding, "padding"), _count(invalid, "invalid"))
        if not load.real or len(load.real) != len(load.padding):
            raise ValueError("expert_load has rows of unequal or no length")
        loads[_count(layer, "a layer")] = load
    if len({len(load.real) for load in loads.values()}) > 1:
        raise ValueError("expert_load has rows of unequal or no length")
    return loads


def _failure(found: dict[str, Any]) -> Failure:
    return Failure(_text(found.get("type"), "error.type"), _text(found.get("text"), "error.text"))


def _check_tokens(session: Session) -> None:
    counts = (session.tokens_measured, session.tokens_differing)
    if counts[1] > counts[0]:
        raise ValueError(f"tokens_differing is {counts[1]}, more than there are")
    if session.tokens is not None:
        codes = trace.unpack_tokens(session.tokens)
        if (len(codes) - codes.count(0), codes.count(2)) != counts:
            raise ValueError("tokens are not those that were counted")


def _dict(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {_short(value)}")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is {_short(value)}")
    return value


def _text(value: Any, what: str, most: int = _MAX_CHARACTERS) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise ValueError(f"{what} is {_short(value)}")
    return value.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written


def _whole(value: Any, what: str) -> int:
    if type(value) is not int or abs(value) >= _MOST:
        raise ValueError(f"{what} is {_short(value)}")
    return value


def _count(value: Any, what: str) -> int:
    if _whole(value, what) < 0:
        raise ValueError(f"{what} is {value}")
    return int(value)


def _counts(value: Any, what: str) -> list[int]:
    return [_count(number, what) for number in _list(value, what)]


def _number(value: Any, what: str) -> float:
    """Also "nan", "inf" and "-inf", which JSON has as text."""
    known = type(value) in (int, float) or value in ("nan", "inf", "-inf")
    if not known or (isinstance(value, int) and abs(value) >= _MOST):
        raise ValueError(f"{what} is {_short(value)}")
    return float(value)


def _short(value: Any) -> str:
    return type(value).__name__ if isinstance(value, (dict, list)) else f"{value!r:.40}"
