"""Method configurations: frozen, hashable values that say what to do, never how it went."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from tomepass.errors import TomeError
from tomepass.schedule import (
    TARGETS,
    Schedule,
    as_int,
    counts_per_block,
    parse_schedule,
    parse_target,
)

RLike = int | list[int] | tuple[int, float] | Schedule


@dataclass(frozen=True)
class ToMe:
    """Token Merging, arXiv 2210.09461: bipartite soft matching of the attention keys.

    Args:
        r: tokens merged a block. An int is the same count in every block, a list one count a
            block (padded with zeros), a pair ``(r, inflection)`` with inflection in [-1, 1] a
            linear schedule (-1 from 2r down to 0, 0 constant, +1 from 0 up to 2r). Default 16.
        macs: instead of r: the share of the unmerged multiply-accumulates to keep, as in 0.6.
            The counts are solved for each model, as even over its blocks as they can be.
        speedup: instead of r: the unmerged multiply-accumulates over the merged ones, as in 1.5.
        multiple_of: after the first merge, the counts of tokens left are rounded down to
            multiples of this, at equal or fewer multiply-accumulates: matrix units take 16.
        prop_attn: add log(size) to the attention scores of merged keys (section 3, eq. 1).
        protected: positions never merged. None reads them off the graph: the tokens that do
            not come from the input (class, distillation and register tokens).
        trace_source: keep the map from every original token to its final one.

    Raises:
        TypeError: if ``r`` is a float, a bool, or holds one; if more than one of ``r``, ``macs``
            and ``speedup`` is given.
        ValueError: if a count is negative, an inflection lies outside [-1, 1], or a target is out
            of its range.
    """

    name: ClassVar[str] = "tome"

    r: RLike = 16
    prop_attn: bool = True
    protected: tuple[int, ...] | None = None
    trace_source: bool = False
    multiple_of: int = 1

    def __init__(
        self,
        r: RLike | None = None,
        *,
        macs: float | None = None,
        speedup: float | None = None,
        prop_attn: bool = True,
        protected: tuple[int, ...] | list[int] | None = None,
        trace_source: bool = False,
        multiple_of: int = 1,
    ) -> None:
        # A frozen dataclass normalises through object.__setattr__, once, here.
        for field, value in (
            ("r", _schedule(r, macs, speedup)),
            ("prop_attn", _flag("prop_attn", prop_attn)),
            ("protected", _positions(protected)),
            ("trace_source", _flag("trace_source", trace_source)),
            ("multiple_of", _multiple(multiple_of)),
        ):
            object.__setattr__(self, field, value)

    @property
    def schedule(self) -> Schedule:
        """The normalised ``r``."""
        assert isinstance(self.r, Schedule)
        return self.r

    def counts(self, blocks: int) -> tuple[int, ...]:
        """Tokens asked to merge in each of ``blocks`` blocks, before the cap.

        Raises:
            ValueError: if ``r`` is a list longer than the blocks.
        """
        return counts_per_block(self.schedule, blocks)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON types; :func:`method_from_dict` reads it back."""
        return {
            "method": self.name,
            "r": self.schedule.to_json(),
            "prop_attn": self.prop_attn,
            "protected": None if self.protected is None else list(self.protected),
            "trace_source": self.trace_source,
            "multiple_of": self.multiple_of,
        }

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> ToMe:
        """The configuration that :meth:`to_json` wrote."""
        return method_from_dict(json.loads(text))

    def replace(self, **changes: Any) -> ToMe:
        """A copy with some fields changed; ``macs`` or ``speedup`` takes the place of ``r``."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if any(target in changes for target in TARGETS):
            del fields["r"]
        return ToMe(**(fields | changes))

    def __repr__(self) -> str:
        shown = [repr(self.schedule)]
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name != "r"}
        for name, default in defaults.items():
            if (value := getattr(self, name)) != default:
                shown.append(f"{name}={value!r}")
        return f"ToMe({', '.join(shown)})"


def method_from_dict(data: dict[str, Any]) -> ToMe:
    """The method that ``to_dict`` wrote.

    Raises:
        TomeError: on an unknown method or field.
    """
    fields = dict(data)
    if (name := fields.pop("method", ToMe.name)) != ToMe.name:
        raise TomeError(f"unknown method {name!r}; known: {ToMe.name!r}")
    known = {f.name for f in dataclasses.fields(ToMe)}
    if unknown := sorted(set(fields) - known):
        raise TomeError(f"unknown fields {unknown} of method {name!r}; known: {sorted(known)}")
    if "r" in fields:
        fields["r"] = Schedule.from_json(fields["r"])
    return ToMe(**fields)


def resolve_method(method: ToMe | None, r: RLike | None) -> ToMe:
    """The method a call asks for: ``r=`` is short for ``ToMe(r=...)``, neither is ``ToMe()``.

    Raises:
        TypeError: if both are given, or ``method`` is not a method.
    """
    if method is not None and r is not None:
        raise TypeError("give either method= or r=, not both: r=8 is short for method=ToMe(r=8)")
    if method is None:
        return ToMe() if r is None else ToMe(r=r)
    if not isinstance(method, ToMe):
        raise TypeError(f"method must be a tomepass method such as ToMe(r=16), got {method!r}")
    return method


def _schedule(r: RLike | None, macs: float | None, speedup: float | None) -> Schedule:
    given = {"r": r, "macs": macs, "speedup": speedup}
    if len(names := [name for name, value in given.items() if value is not None]) > 1:
        raise TypeError(f"give one of r, macs and speedup, got {' and '.join(names)}")
    if macs is not None or speedup is not None:
        return parse_target(names[0], given[names[0]])
    return parse_schedule(16 if r is None else r)


def _multiple(value: object) -> int:
    if (multiple := as_int(value)) is None:
        raise TypeError(f"multiple_of: expected an int, got {value!r}")
    if multiple < 1:
        raise ValueError(f"multiple_of: expected 1 or more, got {multiple}")
    return multiple


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def _positions(value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"protected must be a tuple of token positions or None, got {value!r}")
    positions = set()
    for given in value:
        if (position := as_int(given)) is None:
            raise TypeError(f"protected must hold int positions, got {given!r}")
        if position < 0:
            raise ValueError(f"protected positions count from 0, got {position}")
        positions.add(position)
    return tuple(sorted(positions))
