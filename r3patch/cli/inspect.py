"""``r3patch inspect``: look into a file of routes, or compare two."""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from r3patch._errors import R3PatchError
from r3patch.cli._selection import Array, Selection, compare
from r3patch.cli._terminal import console, paragraph, plain, table
from r3patch.observe.numerals import percent, spans
from r3patch.rows.files import is_one
from r3patch.rows.overlap import suspicious_overlap

_BLOCKS = "·▁▂▃▄▅▆▇█"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="what Routes.save wrote, or a payload: .json, .npy, base64")
    parser.add_argument("other", nargs="?", help="a second file, to compare the first with")
    sizes = parser.add_argument_group("payloads", "what a payload does not say itself")
    for name in ("num-tokens", "num-experts", "topk", "num-layers"):
        sizes.add_argument(f"--{name}", type=int, metavar="N")
    sizes.add_argument(
        "--moe-layers",
        metavar="LIST",
        help="1-based layer numbers, such as 4-61 or 2,4,6; all layers if left out",
    )


def run(args: argparse.Namespace) -> int:
    """One file: 1 if a layer is suspicious. Two: 1 if they differ, as diff has it. Else 0."""
    out = console()
    files = [path for path in (args.file, args.other) if path is not None]
    try:
        routes = [load(path, args) for path in files]
    except OSError as error:  # torch's on a cut file has no name
        raise R3PatchError(error if error.filename else f"{' or '.join(files)}: {error}") from error
    return _show(out, args.file, routes[0]) if len(routes) == 1 else _compare(out, *routes)


def load(path: str, args: argparse.Namespace) -> Selection:
    """Routes from a file of any kind that `add_arguments` names, told apart by content.

    Only payloads need torch.
    """
    data = Path(path).read_bytes()
    if is_one(data):
        return Selection.read(path)
    if data.startswith(b'{"schema":'):
        raise R3PatchError(f"{path} is a trace and holds no routes: r3patch report {path}")
    names = ("num_tokens", "num_experts", "topk", "num_layers")
    absent = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is None]
    if absent:
        raise R3PatchError(
            f"{path} is no file of Routes.save. If it is an engine's payload, add "
            f"{', '.join(absent)}."
        )
    from r3patch.rows.decode import decode

    routes = decode(
        _payload(path, data),
        **{name: getattr(args, name) for name in names},
        moe_layers=_numbers(args.moe_layers) if args.moe_layers else None,
        on_bad_rows="invalid",
        name=path,
    )
    return Selection.of(routes)


def _payload(path: str, data: bytes) -> Any:
    text = data.strip()
    try:
        if data[:6] == b"\x93NUMPY":
            return np.load(io.BytesIO(data), allow_pickle=False)
        return json.loads(text) if text[:1] in (b"[", b"{", b'"') else text
    except Exception as error:  # numpy and json raise half a dozen kinds on foreign bytes
        kind = "a .npy file" if data[:6] == b"\x93NUMPY" else "JSON"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise R3PatchError(f"{path} starts like {kind}, but is not: {reason:.200}") from error


def _numbers(text: str) -> list[int]:
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            numbers += range(int(first), int(last if dash else first) + 1)
    except ValueError:
        raise R3PatchError(f"--moe-layers is {text!r}, expected such as 4-61 or 2,4,6.") from None
    return numbers


def suspicions(routes: Selection) -> Iterator[tuple[int, str]]:
    """Layers that look like no router's choice, as (layer number, why)."""
    previous: Array | None = None
    for column, (layer, counts) in enumerate(zip(routes.layers, routes.load(), strict=True)):
        rows = np.sort(routes.experts[routes.valid[:, column], column], -1)
        share = int(counts.max()) / len(rows) if len(rows) else 0.0
        if routes.num_tokens and not len(rows):
            yield layer, "no valid row: the engine did not capture this layer, or it is dense"
        elif len(rows) >= 16 and bool((rows == rows[0]).all()):
            yield layer, f"constant: every row is {rows[0].tolist()}"
        elif len(rows) >= 16 and share > 0.9 and routes.topk < routes.num_experts // 2:
            yield layer, f"one expert is in {share:.0%} of the rows"
        if previous is not None and len(rows) >= 16 and np.array_equal(rows, previous):
            yield layer, f"equal to layer {routes.layers[column - 1]} in every row"
        previous = rows


def _show(out: Any, path: str, routes: Selection) -> int:
    total, valid = routes.valid.size, int(routes.valid.sum())
    covered = valid / total if total else math.nan
    facts = [
        ("tokens", str(routes.num_tokens)),
        ("layers", f"{len(routes.layers)}: {spans(routes.layers)}"),
        ("experts", f"top-{routes.topk} of {routes.num_experts}"),
        ("valid rows", f"{valid} of {total} ({covered:.1%})"),
    ]
    if routes.tokens is not None:
        facts.append(("token ids", f"{int((routes.tokens >= 0).sum())} of {routes.num_tokens}"))
    if routes.bad_rows:
        facts.append(("bad rows", f"{routes.bad_rows} (marked invalid)"))
    out.print(table(plain(path), [], facts))
    width = max(8, min(routes.num_experts, out.width - 27))
    rows = [
        (str(layer), heat(counts.tolist(), width), f"{_imbalance(counts):.2f}", str(int(invalid)))
        for layer, counts, invalid in zip(
            routes.layers, routes.load(), (~routes.valid).sum(0), strict=True
        )
    ]
    title = f"Expert load: expert 0 left, {routes.num_experts - 1} right"
    out.print(table(title, ["layer", "rows by expert", "max/mean", "invalid"], rows))
    found = list(suspicions(routes))
    for layer, text in found:
        out.print(f"[bold yellow]suspicious[/] layer {layer}")
        out.print(paragraph(text))
    if not found:
        out.print("No layer is suspicious.")
    return 1 if found else 0


def _imbalance(counts: Array) -> float:
    return float(counts.max() / counts.mean()) if counts.any() else math.nan


def heat(counts: list[int], width: int) -> Any:
    """Counts as a bar of blocks, neighbours summed to `width`; full is twice the mean or more."""
    text = Text()
    edges = [round(i * len(counts) / width) for i in range(width + 1)]
    bins = [sum(counts[a:b]) / (b - a) for a, b in pairwise(edges) if b > a]
    mean = sum(counts) / len(counts) if counts else 0
    for value in bins:
        level = min(1.0, value / (2 * mean)) if mean else 0.0
        block = _BLOCKS[math.ceil(level * (len(_BLOCKS) - 1))]
        text.append(block, style=_color(value / mean) if mean else "dim")
    return text


def _color(load: float) -> str:
    """Blue below, grey around, and red above an even load."""
    bounds = ((0.33, "blue"), (0.67, "cyan"), (1.5, "white"), (2.5, "yellow"))
    return next((color for bound, color in bounds if load < bound), "red")


def _compare(out: Any, a: Selection, b: Selection) -> int:
    common = [layer for layer in a.layers if layer in b.layers]
    if set(a.layers) != set(b.layers):
        out.print(f"[yellow]Only layers {spans(common)} are in both.[/]")
    a, b = a.select(common), b.select(common)
    if a.num_tokens != b.num_tokens:
        short = min(a.num_tokens, b.num_tokens)
        out.print(f"[yellow]{a.num_tokens} and {b.num_tokens} tokens: the first {short} count.[/]")
        a, b = a.rows(slice(short)), b.rows(slice(short))
    found = compare(a, b)
    rows = []
    for layer, n, differing, overlap in zip(
        a.layers, found.rows, found.differing, found.overlaps, strict=True
    ):
        mismatch = differing / n if n else math.nan
        rows.append((str(layer), str(n), percent(mismatch), percent(overlap), _bar(mismatch)))
    out.print(table("Where they differ", ["layer", "rows", "differ", "overlap", ""], rows))
    whole = percent(sum(found.differing), sum(found.rows))
    out.print(f"{whole} of rows differ, overlap {percent(found.overlap)}.")
    part = percent(found.tokens_differing, found.tokens)
    out.print(f"{part} of tokens differ in at least one layer.")
    if others := _other_tokens(a, b):
        out.print(f"[bold yellow]suspicious[/] {others} of {a.num_tokens} token ids are others.")
    for text in shifts(a, b):
        out.print(f"[bold yellow]suspicious[/] {text}")
    return 1 if any(found.differing) or others else 0


def _other_tokens(a: Selection, b: Selection) -> int:
    if a.tokens is None or b.tokens is None:
        return 0
    return int(((a.tokens != b.tokens) & (a.tokens >= 0) & (b.tokens >= 0)).sum())


def shifts(a: Selection, b: Selection) -> Iterator[str]:
    """Where two selections look unrelated: whether a shift by layers or tokens explains it."""
    overlap = compare(a, b).overlap
    bound = suspicious_overlap(a.topk, a.num_experts)
    if not overlap < bound:
        return
    yield (
        f"overlap {overlap:.1%}, where unrelated routes have "
        f"{a.topk / a.num_experts:.1%}: these are not the same tokens, layers and weights."
    )
    for by in (-2, -1, 1, 2):
        overlap = _overlap_by_layer_shift(a, b, by)
        if overlap > bound:
            yield f"The second is shifted by {by:+d} MoE layer(s): then they overlap {overlap:.1%}."
        overlap = _overlap_by_token_shift(a, b, by)
        if overlap > bound:
            yield f"The second is shifted by {by:+d} token(s): then they overlap {overlap:.1%}."


def _overlap_by_layer_shift(a: Selection, b: Selection, by: int) -> float:
    layers = sorted(a.layers)
    if abs(by) >= len(layers):
        return math.nan
    ours, theirs = (layers[:-by], layers[by:]) if by > 0 else (layers[-by:], layers[:by])
    return compare(a.select(ours), b.select(theirs)).overlap


def _overlap_by_token_shift(a: Selection, b: Selection, by: int) -> float:
    n = a.num_tokens
    if abs(by) >= n:
        return math.nan
    ours, theirs = (slice(0, n - by), slice(by, n)) if by > 0 else (slice(-by, n), slice(0, n + by))
    return compare(a.rows(ours), b.rows(theirs)).overlap


def _bar(part: float) -> str:
    return "" if math.isnan(part) else "█" * math.ceil(part * 16)
