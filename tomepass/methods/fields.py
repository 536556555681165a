"""Checks of what users write into a method's fields: the value, normalised, or an error."""

from __future__ import annotations

from collections.abc import Sequence

from tomepass.counts.schedule import as_int


def choice(name: str, value: object, among: Sequence[str]) -> str:
    """One of some words.

    Raises:
        ValueError: if it is none of them.
    """
    if value not in among:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, among))}, got {value!r}")
    return str(value)


def flag(name: str, value: object) -> bool:
    """True or False.

    Raises:
        TypeError: if it is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def whole(name: str, value: object, least: int = 0) -> int:
    """An int.

    Raises:
        TypeError: if it is none.
        ValueError: if it lies below ``least``.
    """
    if (number := as_int(value)) is None:
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if number < least:
        raise ValueError(f"{name}: expected {least} or more, got {number}")
    return number


def number(name: str, value: object, least: float, most: float, *, above: bool = False) -> float:
    """A number in [least, most], or in (least, most] if it must be ``above``.

    Raises:
        TypeError: if it is no number.
        ValueError: if it lies outside.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not (least < value if above else least <= value) or not value <= most:
        bracket = "(" if above else "["
        raise ValueError(f"{name}: expected a number in {bracket}{least}, {most}], got {value!r}")
    return float(value)


def positions(name: str, value: object) -> tuple[int, ...] | None:
    """Positions of tokens or blocks, ascending, or None.

    Raises:
        TypeError: if it is no list or tuple of ints.
        ValueError: if one is negative.
    """
    if value is None:
        return None
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be a tuple of positions or None, got {value!r}")
    found = set()
    for given in value:
        if (position := as_int(given)) is None:
            raise TypeError(f"{name} must hold int positions, got {given!r}")
        if position < 0:
            raise ValueError(f"{name} positions count from 0, got {position}")
        found.add(position)
    return tuple(sorted(found))
