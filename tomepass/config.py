"""Method configurations: frozen, hashable values that say what to do, never how it went."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

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
Metric = Literal["keys", "keys_all_heads", "queries", "values", "hidden"]
Similarity = Literal["cosine", "dot", "euclidean", "softmax"]
Partition = Literal["alternating", "sequential", "random"]
Combine = Literal["weighted_mean", "mean", "max", "keep"]
Importance = Literal["none", "class_attention"]


@dataclass(frozen=True)
class MLERP:
    """Combine tokens into a mean direction with a preserved norm (ToFu, arXiv 2312.01026).

    Args:
        norm: ``"max"``, the weighted mean at the greatest norm among its tokens; ``"mean"``, the
            mean of the directions at the mean of the norms, both weighted by size.
    """

    norm: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        _choice("norm", self.norm, ("max", "mean"))


# Written to JSON where they are not the paper's.
_CHOICES = ("metric", "similarity", "combine", "partition", "seed", "importance", "exponent")


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
        metric: what tokens are compared by: the attention's ``"keys"``, ``"queries"`` or
            ``"values"``, the mean over heads; ``"keys_all_heads"``, all heads side by side;
            ``"hidden"``, the residual stream (table 1a).
        similarity: ``"cosine"``, ``"dot"``, ``"euclidean"`` or ``"softmax"``, what attention
            would give each destination (table 1b).
        combine: how tokens become one: ``"weighted_mean"`` by size, ``"mean"``, ``"max"`` of each
            channel, ``"keep"`` the destination's (table 1c), or :class:`MLERP`.
        partition: sources are the even positions (``"alternating"``), the first half
            (``"sequential"``) or a ``"random"`` half (table 1d).
        seed: of a random partition, which is the same everywhere for the same seed.
        importance: ``"class_attention"`` makes merging away a token dearer the more the class
            token attends to it (where there is none, the more all tokens do): its dissimilarity
            is multiplied with that attention to the power ``exponent``.
        exponent: of the importance.

    Raises:
        TypeError: if ``r`` is a float, a bool, or holds one; if more than one of ``r``, ``macs``
            and ``speedup`` is given.
        ValueError: if a count is negative, an inflection lies outside [-1, 1], a target is out
            of its range, a choice is not one of those above, or two make no sense together.
    """

    name: ClassVar[str] = "tome"

    r: RLike = 16
    prop_attn: bool = True
    protected: tuple[int, ...] | None = None
    trace_source: bool = False
    multiple_of: int = 1
    metric: Metric = "keys"
    similarity: Similarity = "cosine"
    combine: Combine | MLERP = "weighted_mean"
    partition: Partition = "alternating"
    seed: int = 0
    importance: Importance = "none"
    exponent: float = 0.3

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
        metric: Metric = "keys",
        similarity: Similarity = "cosine",
        combine: Combine | MLERP = "weighted_mean",
        partition: Partition = "alternating",
        seed: int = 0,
        importance: Importance = "none",
        exponent: float = 0.3,
    ) -> None:
        # A frozen dataclass normalises through object.__setattr__, once, here.
        for field, value in (
            ("r", _schedule(r, macs, speedup)),
            ("prop_attn", _flag("prop_attn", prop_attn)),
            ("protected", _positions(protected)),
            ("trace_source", _flag("trace_source", trace_source)),
            ("multiple_of", _multiple(multiple_of)),
            ("metric", _choice("metric", metric, get_args(Metric))),
            ("similarity", _choice("similarity", similarity, get_args(Similarity))),
            ("combine", _combine(combine)),
            ("partition", _choice("partition", partition, get_args(Partition))),
            ("seed", _seed(seed)),
            ("importance", _choice("importance", importance, get_args(Importance))),
            ("exponent", _exponent(exponent)),
        ):
            object.__setattr__(self, field, value)
        self._refuse_nonsense()

    def _refuse_nonsense(self) -> None:
        if self.importance != "none" and self.similarity in ("dot", "softmax"):
            raise ValueError(
                f"importance={self.importance!r} weighs dissimilarities, which "
                f"similarity={self.similarity!r} has none of: use 'cosine' or 'euclidean'"
            )
        if self.seed and self.partition != "random":
            raise ValueError(f"seed={self.seed} does nothing with partition={self.partition!r}")
        if self.exponent != 0.3 and self.importance == "none":
            raise ValueError(f"exponent={self.exponent!r} does nothing with importance='none'")

    @property
    def plain_matching(self) -> bool:
        """Whether tokens are matched as the paper does by default: ``tome::match``."""
        chosen = (self.metric, self.similarity, self.partition, self.importance)
        return chosen == ("keys", "cosine", "alternating", "none")

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
        combine = self.combine
        chosen = {
            name: value
            for name in _CHOICES
            if (value := getattr(self, name)) != type(self).__dataclass_fields__[name].default
        }
        if isinstance(combine, MLERP):
            chosen["combine"] = {"mlerp": combine.norm}
        return {
            "method": self.name,
            "r": self.schedule.to_json(),
            "prop_attn": self.prop_attn,
            "protected": None if self.protected is None else list(self.protected),
            "trace_source": self.trace_source,
            "multiple_of": self.multiple_of,
        } | chosen

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
    if isinstance(combine := fields.get("combine"), dict):
        fields["combine"] = MLERP(combine["mlerp"])
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


def _choice(name: str, value: object, among: tuple[str, ...]) -> str:
    if value not in among:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, among))}, got {value!r}")
    return str(value)


def _combine(value: object) -> str | MLERP:
    if isinstance(value, MLERP):
        return value
    among = get_args(Combine)
    if value not in among:
        known = ", ".join(map(repr, among))
        raise ValueError(f"combine must be one of {known}, or MLERP(...), got {value!r}")
    return str(value)


def _seed(value: object) -> int:
    if (seed := as_int(value)) is None or seed < 0:
        raise ValueError(f"seed must be an int from 0, got {value!r}")
    return seed


def _exponent(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"exponent must be a number above 0, got {value!r}")
    return float(value)


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
