"""How numbers and names are written for readers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers with runs put together: 2, 4-61."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def percent(part: float, whole: float = 1) -> str:
    """With a digit more where little is left to see; "-" of nothing."""
    if not whole or math.isnan(part):
        return "-"
    return f"{part / whole:.2%}" if 0 < part / whole < 0.01 else f"{part / whole:.1%}"


def compact(number: float) -> str:
    """Three digits and a power of a thousand: 1.23M."""
    if number < 10_000:
        return f"{int(number):,}"
    power = min(5, int(math.log10(number) // 3))
    return f"{number / 1000**power:.3g}{' kMGTP'[power]}"


def plural(count: int, noun: str) -> str:
    """1 session, 1,200 sessions."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def some(names: Sequence[str]) -> str:
    """The first three: a, b, c and 4 more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
