"""Walks up a graph, each place visited once: residual sums make as many paths as there are ways."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Place = TypeVar("Place", bound=Hashable)

Answer = TypeVar("Answer")


def answered(
    asked: Place,
    known: dict[Place, Answer],
    needs: Callable[[Place], Iterable[Place]],
    answer: Callable[[Place], Answer],
) -> Answer:
    """The answer at a place, worked out from those at the places it needs, and these before.

    Nothing recurses, or a deep model would be too deep for Python.

    Args:
        asked: where; a node, or a node and a dimension.
        known: answers so far, to which all that were needed are added.
        needs: the places whose answers must be known before; no place needs itself.
        answer: the answer at a place, once those it needs are known.
    """
    waiting = [asked]
    while waiting:
        place = waiting[-1]
        if place in known:
            waiting.pop()
            continue
        missing = [other for other in needs(place) if other not in known]
        if missing:
            waiting += reversed(missing)
        else:
            known[place] = answer(place)
    return known[asked]
