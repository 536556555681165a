"""Schedules: from ``r`` to the tokens merged in each block, worked out before any run."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal


class CountsError(ValueError):
    """Counts or places of blocks that do not fit as many blocks as there are."""


TARGETS = ("macs", "speedup")
"""What counts are solved for."""


_SINGLE = ("keep_rate", *TARGETS)


@dataclass(frozen=True)
class Schedule:
    """A normalised ``r``: ``[13, 0]`` and ``(13, 0)`` stay different things.

    Args:
        kind: ``"constant"`` (one int), ``"list"`` (a count a block), ``"linear"``
            (``(r, inflection)``), ``"keep_rate"`` (the share of the tokens that stays in a block
            that reduces), or a target that the counts are solved for: ``"macs"`` (what is left of
            the unmerged multiply-accumulates) or ``"speedup"`` (its inverse).
        values: the int, the list, the pair, the rate or the target, as a tuple.
    """

    kind: Literal["constant", "list", "linear", "keep_rate", "macs", "speedup"]
    values: tuple[int | float, ...]

    @property
    def macs(self) -> float | None:
        """The share of the unmerged multiply-accumulates to keep; None where counts are given."""
        if self.kind not in TARGETS:
            return None
        return self.values[0] if self.kind == "macs" else 1.0 / self.values[0]

    def as_written(self) -> dict[str, Any]:
        """``r``, ``macs``, ``speedup`` and ``keep_rate`` as a user gives them; one is not None."""
        names: dict[str, Any] = dict.fromkeys(("r", *_SINGLE))
        if self.kind in _SINGLE:
            return {**names, self.kind: self.values[0]}
        if self.kind == "constant":
            return {**names, "r": self.values[0]}
        return {**names, "r": list(self.values) if self.kind == "list" else self.values}

    def to_json(self) -> Any:
        """An int, a list of ints, ``{"r": r, "inflection": i}``, or ``{"macs": share}``."""
        if self.kind in _SINGLE:
            return {self.kind: self.values[0]}
        if self.kind == "constant":
            return self.values[0]
        if self.kind == "list":
            return list(self.values)
        return {"r": self.values[0], "inflection": self.values[1]}

    @staticmethod
    def from_json(data: Any) -> Schedule:
        """Reads what :meth:`to_json` wrote."""
        if isinstance(data, dict):
            if len(data) == 1 and (kind := next(iter(data))) in _SINGLE:
                return parse_target(kind, data[kind])
            if set(data) != {"r", "inflection"}:
                raise ValueError(f"expected r as {{r, inflection}}, got {data!r}")
            return parse_schedule((data["r"], data["inflection"]))
        return parse_schedule(data)

    def __repr__(self) -> str:
        if self.kind in _SINGLE:
            return f"{self.kind}={self.values[0]}"
        if self.kind == "constant":
            return f"r={self.values[0]}"
        return f"r={list(self.values) if self.kind == 'list' else self.values}"


def parse_schedule(r: Any) -> Schedule:
    """Checks and normalises an ``r`` as users write it.

    Raises:
        TypeError: on a float, a bool, or anything that is not an int, a list or a pair.
        ValueError: on a negative count or an inflection outside [-1, 1].
    """
    if isinstance(r, Schedule):
        return r
    if isinstance(r, list):
        return Schedule("list", tuple(_count(v) for v in r))
    if isinstance(r, tuple):
        if len(r) != 2:
            raise ValueError(
                f"a tuple r is a pair (r, inflection), got {len(r)} values: {r!r}; "
                "write a list for one count a block"
            )
        return Schedule("linear", (_count(r[0]), _inflection(r[1])))
    return Schedule("constant", (_count(r),))


def parse_target(kind: str, value: Any) -> Schedule:
    """Something else than counts: ``("macs", 0.6)``, ``("speedup", 1.5)``, ``("keep_rate", 0.7)``.

    Raises:
        TypeError: if the value is not a number.
        ValueError: if ``macs`` or ``keep_rate`` lies outside (0, 1], or ``speedup`` is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{kind}: expected a number, got {value!r}")
    target = float(value)
    if kind != "speedup" and not 0 < target <= 1:
        raise ValueError(f"{kind} is the share to keep, above 0 and at most 1, got {value}")
    if kind == "speedup" and not 1 <= target < math.inf:
        raise ValueError(f"speedup: expected 1 or more, got {value}")
    return Schedule(kind, (target,))  # type: ignore[arg-type]


def counts_per_block(schedule: Schedule, blocks: int) -> tuple[int, ...]:
    """Counts asked for in each block, before the cap (ToMe paper, section 4.1 and appendix).

    ``(r, inflection)``: lo = int(r (1 - inflection)), hi = 2r - lo, linear from lo to hi over
    the blocks, each truncated.

    Raises:
        CountsError: if a list is longer than ``blocks``.
        ValueError: if the schedule is a target, whose counts depend on the model.
    """
    if schedule.kind in _SINGLE:
        raise ValueError(f"{schedule!r} becomes counts only for a model: see explain()")
    if schedule.kind == "constant":
        return (int(schedule.values[0]),) * blocks
    if schedule.kind == "list":
        counts = tuple(int(v) for v in schedule.values)
        if len(counts) > blocks:
            raise CountsError(
                f"r lists {len(counts)} counts but the model has {blocks} blocks: "
                f"give at most {blocks}"
            )
        return counts + (0,) * (blocks - len(counts))
    r, inflection = int(schedule.values[0]), schedule.values[1]
    if blocks == 1:
        return (r,)  # no line through one block; its mean is r
    low = int(r * (1 - inflection))
    high = 2 * r - low
    # In integers, where no rounding can lose a whole token.
    return tuple(low + (high - low) * i // (blocks - 1) for i in range(blocks))


def capped(r: int, tokens: int, protected: Collection[int]) -> int:
    """How many tokens can really merge in a block: at most half, and never a protected one.

    Args:
        r: the count asked for.
        tokens: tokens entering the block.
        protected: their protected positions.
    """
    held = set(protected)
    sources = sum(1 for i in range(0, tokens, 2) if i not in held)
    free = tokens - len(held)
    return max(0, min(r, free // 2, sources)) if free > sources else 0


def merged_at_most(tokens: int, protected: Collection[int]) -> int:
    """The most that can merge in a block."""
    return capped(tokens, tokens, protected)


def all_but_one(tokens: int, protected: Collection[int]) -> int:
    """The most that can be dropped in a block, or put together in clusters."""
    return max(0, tokens - len(set(protected)) - 1)


def as_int(value: Any) -> int | None:
    """The int that ``value`` is, numpy's included; None for a bool, a float and all the rest."""
    # A bool of torch, or of numpy before 2, is an index too.
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _count(value: Any) -> int:
    count = as_int(value)
    if count is None:
        raise TypeError(f"r counts tokens: expected an int, got {value!r}")
    if count < 0:
        raise ValueError(f"r counts tokens: expected 0 or more, got {count}")
    return count


def _inflection(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"inflection: expected a number in [-1, 1], got {value!r}")
    if not -1 <= (inflection := float(value)) <= 1:
        raise ValueError(f"inflection: expected a number in [-1, 1], got {value}")
    return inflection
