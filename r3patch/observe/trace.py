"""The trace: one JSON line per session and rank, at the path of ``R3PATCH_TRACE``.

docs/observe.md describes the format. Each rank writes a file of its own (``run.jsonl`` becomes
``run.rank0.jsonl``), each line by a single append: what a crash leaves behind is whole lines. The
trace is an instrument, so it never stops a run: what cannot be written is logged once.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r3patch import _config
from r3patch._errors import R3PatchError
from r3patch._version import version
from r3patch.labels.targets import megatron_version

if TYPE_CHECKING:
    from r3patch.metrics import ExpertLoad
    from r3patch.observe.stats import ReplayStats

logger = logging.getLogger(__name__)

SCHEMA = 1
#: A file that would grow beyond this gets a last line of kind "truncated" and nothing more.
MAX_FILE_BYTES = 1 << 30
#: A line that would be longer loses its largest parts, which it then names in ``dropped``.
MAX_LINE_BYTES = 4 << 20
MAX_ERROR_CHARACTERS = 4000

_process = uuid.uuid4().hex[:12]
_silenced = False


def enabled() -> bool:
    """Whether ``R3PATCH_TRACE`` names a file."""
    return _config.CONFIG.trace is not None


def session(
    kind: str,
    *,
    step: int | None = None,
    stats: ReplayStats | None = None,
    notes: Mapping[str, float] | None = None,
    seconds: Mapping[str, float] | None = None,
    expert_load: ExpertLoad | None = None,
    error: BaseException | None = None,
) -> dict[str, Any]:
    """The record of a session, for `write`.

    Args:
        kind: ``"replay"`` or ``"record"``.
        step: the training step.
        stats: what the session did; reading it waits for the device if it was measured.
        notes: numbers of the user.
        seconds: further host times next to that of ``stats``, which is ``"copy"``.
        expert_load: of the rows that the session replayed or recorded.
        error: what refused the session or ended it.
    """
    tokens = stats.tokens if stats is not None else b""
    return {
        "kind": kind,
        "step": step,
        "routers": [router.as_dict() for router in stats.routers] if stats is not None else [],
        "tokens_measured": len(tokens) - tokens.count(0),
        "tokens_differing": tokens.count(2),
        "seconds": {"copy": stats.seconds if stats is not None else 0.0, **(seconds or {})},
        "notes": dict(notes or {}),
        "expert_load": None if expert_load is None else _load(expert_load),
        "error": None
        if error is None
        else {"type": type(error).__name__, "text": str(error)[:MAX_ERROR_CHARACTERS]},
    }


def write(record: Mapping[str, Any]) -> None:
    """Append a record of `session` to this rank's file, if there is one. Never raises OSError."""
    global _silenced
    path = _config.CONFIG.trace
    if path is None or _silenced:
        return
    rank = _rank()
    head = {
        "schema": SCHEMA,
        "time": round(time.time(), 3),
        "process": _process,
        "rank": rank,
        "versions": _versions(),
    }
    try:
        if not _append(rank_path(path, rank), _line({**head, **record}), head):
            _silenced = True
            logger.warning("trace: %s has reached %d bytes; it ends here", path, MAX_FILE_BYTES)
    except OSError as error:
        _silenced = True
        logger.warning("trace: cannot write %s, no further attempts: %s", path, error)


def rank_path(path: str | os.PathLike[str], rank: int) -> Path:
    """``run.jsonl`` to ``run.rank0.jsonl``."""
    whole = Path(path)
    return whole.with_name(f"{whole.stem}.rank{rank}{whole.suffix}")


def read(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], int]:
    """The records of one rank's file, and how many lines were unreadable (cut by a crash).

    Raises:
        R3PatchError: the file holds no trace, or one of another schema.
    """
    records, broken = [], 0
    for line in filter(None, Path(path).read_bytes().split(b"\n")):
        try:
            record = json.loads(line)
        except ValueError:
            broken += 1
            continue
        schema = record.get("schema") if isinstance(record, dict) else None
        if schema != SCHEMA:
            raise R3PatchError(
                f"{os.fspath(path)} has a line of schema {schema!r}, this r3patch reads {SCHEMA}: "
                "is it a file that R3PATCH_TRACE wrote, and by this version?"
            )
        records.append(record)
    if not records:
        raise R3PatchError(f"{os.fspath(path)} holds no trace record ({broken} unreadable lines).")
    return records, broken


def _line(record: dict[str, Any]) -> bytes:
    dropped: list[str] = []
    for part, empty in (("expert_load", None), ("routers", []), ("notes", {}), (None, None)):
        line = json.dumps(_plain(record), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        if len(line) <= MAX_LINE_BYTES or part is None:
            break
        dropped.append(part)
        record = {**record, part: empty, "dropped": dropped}
    return line


def _append(path: Path, line: bytes, head: dict[str, Any]) -> bool:
    """Write a whole line; False, with a line that says so, where the file is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            # An earlier write was cut short, or another process is in the middle of one: begin a
            # line of our own. An empty line is nothing to `read`.
            line = b"\n" + line
        full = size + len(line) > MAX_FILE_BYTES
        if full:
            line = _line({**head, "kind": "truncated", "max_bytes": MAX_FILE_BYTES})
        written = os.write(file, line)
        if written != len(line):
            raise OSError(f"{written} of {len(line)} bytes written: is the disk full?")
        return not full
    finally:
        os.close(file)


def _plain(value: Any) -> Any:
    """JSON has no nan and no infinity: they become the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _load(load: ExpertLoad) -> dict[str, Any]:
    return {
        "layers": list(load.layers),
        "real": load.real.tolist(),
        "padding": load.padding.tolist(),
        "invalid": load.invalid.tolist(),
    }


@functools.cache
def _versions() -> dict[str, str]:
    torch = getattr(sys.modules.get("torch"), "__version__", "unknown")
    return {
        "r3patch": version(),
        "torch": str(torch),
        "megatron-core": megatron_version(),
    }


def _rank() -> int:
    # Not imported for this: without it there is one rank.
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return 0
