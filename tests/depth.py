"""Which of a test's cases run every time: few that stand for the others, which are ``deep``.

    @pytest.mark.parametrize("name", at_hand(FAMILIES, ["vit", "beit"]))     # the others: deep
    @pytest.mark.parametrize(("family", "name"), in_turn(FAMILIES, METHODS))  # each value once

``make test`` runs what is not deep, ``make test-all`` everything.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest


def at_hand(values: Iterable[Any], chosen: Collection[Any], ids: Iterable[str] = ()) -> list[Any]:
    """All values as parameters; those that are not chosen are deep."""
    values = list(values)
    missing = [value for value in chosen if value not in values]
    assert not missing, f"not among the values: {missing}"
    names = [*ids] or [None] * len(values)
    return [
        _parameter(value if type(value) is tuple else (value,), value in chosen, name)
        for value, name in zip(values, names, strict=True)
    ]


def in_turn(*axes: Iterable[Any], strength: int = 1) -> list[Any]:
    """The full product; deep but for a covering in which each value, or each ``strength`` of
    values of as many axes, occurs."""
    lists = [list(axis) for axis in axes]
    chosen = set(covering([len(axis) for axis in lists], strength))
    return [
        _parameter(tuple(axis[i] for axis, i in zip(lists, row, strict=True)), row in chosen)
        for row in itertools.product(*(range(len(axis)) for axis in lists))
    ]


def _parameter(values: tuple[Any, ...], quick: bool, name: str | None = None) -> Any:
    return pytest.param(*values, marks=() if quick else pytest.mark.deep, id=name)


def covering(sizes: Sequence[int], strength: int = 2) -> list[tuple[int, ...]]:
    """Rows of one index an axis, such that any ``strength`` axes show every combination.

    Greedy: each row is built axis by axis from the combination longest uncovered, and takes the
    index that covers most. ``covering([3, 3, 3, 3])`` has 9 to 12 rows where the product has 81.
    """
    left = {
        tuple(zip(axes, indices, strict=True))
        for axes in itertools.combinations(range(len(sizes)), min(strength, len(sizes)))
        for indices in itertools.product(*(range(sizes[axis]) for axis in axes))
    }
    used = [[0] * size for size in sizes]
    rows = []
    while left:
        row = dict(min(left))
        for axis, size in enumerate(sizes):
            if axis not in row:
                row[axis] = min(
                    range(size),
                    key=lambda i: (-_covered(left, {**row, axis: i}, axis), used[axis][i], i),
                )
        for axis, index in row.items():
            used[axis][index] += 1
        left = {pairs for pairs in left if not all(row[axis] == i for axis, i in pairs)}
        rows.append(tuple(row[axis] for axis in range(len(sizes))))
    return rows


def _covered(left: Collection[Any], row: dict[int, int], axis: int) -> int:
    """How many combinations with an axis a row covers that no row has covered yet."""
    return sum(
        all(row.get(other) == index for other, index in pairs)
        for pairs in left
        if any(other == axis for other, _ in pairs)
    )
