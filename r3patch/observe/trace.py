"""The trace: one JSON line per session and rank, at the path of ``R3PATCH_TRACE``.

docs/observe.md describes the format. Each rank writes a file of its own (``run.jsonl`` becomes
``run.rank0.jsonl``), each line by a single append: what a crash leaves behind is whole lines. The
trace is an instrument: it never stops a run, and never puts an error of its own over the user's.
What cannot be written is logged once, counted, and named in the trace where that is possible.
"""

from __future__ import annotations

import base64
import functools
import json
import logging
import math
import os
import sys
import time
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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
#: Characters of ``tokens``, and tokens that they may stand for: 512 microbatches of 128k tokens.
MAX_TOKENS = 1 << 20
_MAX_UNPACKED = 1 << 26

_MAX_DEPTH = 8  # of the values in a record; ours have four

_process = uuid.uuid4().hex[:12]
_full = False
_lost = 0  # records since the last one that was written


def enabled() -> bool:
    """Whether ``R3PATCH_TRACE`` names a file."""
    return _config.CONFIG.trace is not None


def session(
    kind: str,
    *,
    step: Any = None,
    name: Any = None,
    stats: ReplayStats | None = None,
    notes: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
    expert_load: ExpertLoad | None = None,
    error: BaseException | None = None,
) -> dict[str, Any]:
    """The record of a session, for `write`.

    Args:
        kind: ``"replay"`` or ``"record"``.
        step: the training step, an integer of any library.
        name: the phase of the step, such as ``"train"`` or ``"logprobs"``.
        stats: what the session did; reading it waits for the device if it was measured.
        notes: numbers of the user.
        seconds: further host times next to that of ``stats``, which is ``"copy"``.
        expert_load: of the rows that the session replayed or recorded.
        error: what refused the session or ended it.
    """
    tokens = stats.tokens if stats is not None else b""
    counted = stats.as_dict() if stats is not None else {}
    return {
        "kind": kind,
        "step": step,
        "name": name,
        "routers": counted.get("routers", []),
        "tokens_measured": len(tokens) - tokens.count(0),
        "tokens_differing": tokens.count(2),
        "tokens": pack_tokens(tokens),
        "token_checks": counted.get("token_checks", []),
        "agreement": counted.get("agreement"),
        "seconds": {"copy": counted.get("seconds", 0.0), **(seconds or {})},
        "notes": {} if notes is None else notes,
        "expert_load": None if expert_load is None else _load(expert_load),
        "error": None if error is None else {"type": type(error).__name__, "text": _text(error)},
    }


def write(record: Mapping[str, Any]) -> None:
    """Append a record of `session` to this rank's file, if there is one. Raises nothing.

    A value that is no number, text or collection of them is left out and named in the record's
    ``dropped``; a record that cannot be written is lost, and counted in the next one's ``lost``.
    """
    global _full, _lost
    path = _config.CONFIG.trace
    if path is None or _full:
        return
    try:
        rank = _rank()
        head = {
            "schema": SCHEMA,
            "time": round(time.time(), 3),
            "process": _process,
            "rank": rank,
            "versions": _versions(),
        }
        lost = {"lost": _lost} if _lost else {}
        if not _append(rank_path(path, rank), _line({**head, **record, **lost}), head):
            _full = True
            logger.warning("trace: %s has reached %d bytes; it ends here", path, MAX_FILE_BYTES)
        _lost = 0
    except Exception as error:  # whatever a record, a file system or torch.distributed raises
        _lost += 1
        if _lost == 1:
            why = f"{type(error).__name__}: {_text(error)}"
            logger.warning("trace: cannot write %s, records are lost until it can: %s", path, why)


def rank_path(path: str | os.PathLike[str], rank: int) -> Path:
    """``run.jsonl`` to ``run.rank0.jsonl``."""
    whole = Path(path)
    return whole.with_name(f"{whole.stem}.rank{rank}{whole.suffix}")


def read(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], int]:
    """The records of one rank's file, and how many lines are none (cut by a crash, or foreign).

    Raises:
        R3PatchError: the file holds no trace record, or none of this schema.
    """
    records: list[dict[str, Any]] = []
    broken, schema = 0, cast("Any", SCHEMA)  # of the last line that is JSON, and not a record
    with Path(path).open("rb") as file:
        while line := file.readline(2 * MAX_LINE_BYTES):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                broken += 1
                continue
            found = record.get("schema") if isinstance(record, dict) else None
            if type(found) is int and found == SCHEMA:
                records.append(record)
            else:
                broken, schema = broken + 1, found
    if records:
        return records, broken
    if schema != SCHEMA:
        raise R3PatchError(
            f"{os.fspath(path)} has a line of schema {schema!r:.40}, this r3patch reads {SCHEMA}: "
            "is it a file that R3PATCH_TRACE wrote, and by this version?"
        )
    raise R3PatchError(f"{os.fspath(path)} holds no trace record ({broken} unreadable lines).")


def pack_tokens(codes: bytes) -> str | None:
    """``ReplayStats.tokens`` as text: base64 of zlib of one byte for each token; None of none."""
    return base64.b64encode(zlib.compress(codes, 1)).decode() if codes else None


def unpack_tokens(text: str) -> bytes:
    """The inverse of `pack_tokens`.

    Raises:
        ValueError: it is none of ours, or more than a session can hold.
    """
    try:
        stream = zlib.decompressobj()
        codes = stream.decompress(base64.b64decode(text, validate=True), _MAX_UNPACKED)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"tokens: {error}") from error
    if not stream.eof or codes.translate(None, b"\0\1\2"):
        raise ValueError("tokens are cut short, too many, or other than 0, 1 and 2")
    return codes


def _line(record: dict[str, Any]) -> bytes:
    """The record as JSON, without what JSON does not know and what is too long, by name."""
    dropped: list[str] = []
    record = _plain(record, dropped)
    if len(record.get("tokens") or "") > MAX_TOKENS:
        record["tokens"] = None
        dropped.append("tokens")
    record["step"] = _whole(record.get("step"), dropped)
    if dropped:
        _warn_dropped(", ".join(dropped))
    for part, empty in (("expert_load", None), ("routers", []), ("notes", {}), (None, None)):
        record |= {"dropped": dropped} if dropped else {}
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        if len(line) <= MAX_LINE_BYTES:
            return line
        if part is not None:
            dropped.append(part)
            record[part] = empty
    raise ValueError(f"a record of {len(line)} bytes; the bound is {MAX_LINE_BYTES}")


def _append(path: Path, line: bytes, head: dict[str, Any]) -> bool:
    """Write a whole line; False, with a line that says so, where the file is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not blocking, should somebody have put a pipe there that nobody reads.
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o644)
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


def _plain(value: Any, dropped: list[str], *where: str) -> Any:
    """Numbers, text, lists and dicts of any library as JSON has them; null, and named, if not.

    JSON has no nan and no infinity: they become the strings "nan", "inf" and "-inf".
    """
    try:
        if len(where) > _MAX_DEPTH:
            raise ValueError("too deep")
        if value is None or isinstance(value, (str, bool)):
            return value
        if isinstance(value, Mapping):
            return {str(k): _plain(v, dropped, *where, str(k)) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [_plain(item, dropped, *where, "[]") for item in value]
        if not isinstance(value, (int, float)):
            # Scalars of numpy and torch have item(); Decimal, Fraction and their like do not.
            value = value.item() if hasattr(value, "item") else float(value)
        if isinstance(value, int):
            return int(value.__index__()) if value.bit_length() < 54 else float(value)
        value = float(value)
        return value if math.isfinite(value) else str(value)
    except Exception:
        if (name := ".".join(where)) not in dropped:
            dropped.append(name)
        return None


def _whole(step: Any, dropped: list[str]) -> int | None:
    if step is None or (isinstance(step, (int, float)) and step == int(step)):
        return None if step is None else int(step)
    dropped.append("step")
    return None


@functools.cache
def _warn_dropped(names: str) -> None:
    logger.warning("trace: records lack %s: neither a number nor text", names)


def _text(error: BaseException) -> str:
    try:
        return str(error)[:MAX_ERROR_CHARACTERS]
    except Exception as failure:
        return f"its text raises {type(failure).__name__}"


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
