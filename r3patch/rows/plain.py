"""Integers, sizes, layer numbers, and the errors of foreign objects. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral

from r3patch._errors import RoutesError


def integer(
    value: object, name: str, least: int, most: int | None = None, *, context: str = ""
) -> int:
    """The value as an int; RoutesError for a bool, a float, anything else, and out of bounds."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if least <= number and (most is None or number <= most):
            return number
    bounds = f"{least} or more" if most is None else f"{least} to {most}"
    raise RoutesError(f"{name} is {value!r}{context}, expected {bounds}, an int.")


class ForeignErrors:
    """Turns any error of a foreign object into a RoutesError: its methods raise what they like.

    A class because a generator's context manager lets StopIteration through where what is raised
    in its place is a RuntimeError, as RoutesError is.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, RoutesError):
            raise RoutesError(f"{self.what}: {type(error).__name__}: {error}") from error


def check_sizes(topk: int, num_experts: int) -> tuple[int, int]:
    """Both as ints; RoutesError unless ``1 <= topk <= num_experts <= 32768``."""
    num_experts = integer(num_experts, "num_experts", 1, 32768)
    if integer(topk, "topk", 0) not in range(1, num_experts + 1):
        raise RoutesError(
            f"topk is {topk} with {num_experts} experts: a row holds topk distinct expert ids."
        )
    return int(topk), num_experts


def check_layers(layers: Iterable[int]) -> tuple[int, ...]:
    """The layer numbers as a tuple of ints, all of them unique and 1 or more."""
    with ForeignErrors("layers is no sequence of Megatron layer numbers"):
        given = tuple(layers)
    try:
        numbers = tuple(integer(number, "a layer", 1) for number in given)
    except RoutesError:
        raise RoutesError(
            f"layers is {given}, expected 1-based Megatron layer numbers (int, 1 or more)."
        ) from None
    if len(set(numbers)) != len(numbers):
        twice = sorted({n for n in numbers if numbers.count(n) > 1})
        raise RoutesError(f"layers names {twice} more than once.")
    return numbers
