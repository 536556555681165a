"""What every reduction method is: a frozen value, a plan step and a graph-building step."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from tomepass.counts.blocks import StreamPlan, held_at, plan_counts
from tomepass.counts.schedule import (
    TARGETS,
    CountsError,
    Schedule,
    counts_per_block,
    merged_at_most,
    parse_schedule,
    parse_target,
)
from tomepass.errors import TomeError
from tomepass.methods.fields import flag, number, positions, whole

if TYPE_CHECKING:
    from tomepass.methods.block import ReducingBlock
    from tomepass.methods.reduction import Reduction


RLike = int | list[int] | tuple[int, float] | Schedule

Own = TypeVar("Own", bound="Method")

KNOWN: dict[str, type[Method]] = {}
"""Every method by its name, a user's own too."""


@dataclass(frozen=True, repr=False)
class Method:
    """A reduction method: how many tokens each block loses, and which.

    A method of your own is a frozen dataclass of this with a ``name`` and a :meth:`reduce`.

    Args:
        r: tokens each block loses. An int is the same count in every block, a list one count a
            block (padded with zeros), a pair ``(r, inflection)`` with inflection in [-1, 1] a
            linear schedule (-1 from 2r down to 0, 0 constant, +1 from 0 up to 2r).
        macs: instead of r: the share of the unmerged multiply-accumulates to keep, as in 0.6.
            The counts are solved for each model, as even over its blocks as they can be.
        speedup: instead of r: the unmerged multiply-accumulates over the reduced ones, as in 1.5.
        keep_rate: instead of r: the share of the tokens, protected ones aside, to keep at each of
            ``blocks``, rounded up (EViT, arXiv 2202.07800).
        blocks: that reduce, counted from 0. None is all of them; with a keep rate those after a
            quarter, a half and three quarters of the depth.
        prop_attn: add log(size) to the attention scores of merged keys (ToMe, eq. 1).
        protected: positions never reduced. None reads them off the graph: the tokens that do
            not come from the input (class, distillation and register tokens).
        trace_source: keep the map from every original token to its final one.
        adaptive: give every image one of a few budgets by how redundant it is: True measures the
            thresholds on the ``example_inputs`` of ``apply``, a tuple gives them.
        multiple_of: after the first reduction, the counts of tokens left are rounded down to
            multiples of this, at equal or fewer multiply-accumulates: matrix units take 16.

    Attributes:
        r: as it was written, the standard count where none was; None beside a rate or a target,
            which ``macs``, ``speedup`` and ``keep_rate`` hold in the same way.
        schedule: whichever was given, normalised.

    Raises:
        TypeError: if ``r`` is a float, a bool, or holds one; if more than one of ``r``, ``macs``,
            ``speedup`` and ``keep_rate`` is given.
        ValueError: if a value is out of its range, a choice is none there is, or two make no
            sense together.
    """

    name: ClassVar[str] = ""
    standard: ClassVar[Schedule] = Schedule("constant", (16,))
    """What is done where no count is given."""
    holes: ClassVar[bool] = False
    """Whether a block may leave tokens of size 0, out of use, in the sequence."""
    every_block: ClassVar[bool] = False
    """Whether, where some block of a stream loses tokens, :meth:`reduce` sees the others too: with
    no token to lose."""
    soft: ClassVar[bool] = False
    """Whether sizes are a mask with gradients that multiplies the exponentials of attention."""

    r: RLike | None = field(default=None, compare=False)  # the schedule is compared
    _: KW_ONLY
    macs: InitVar[float | None] = None
    speedup: InitVar[float | None] = None
    keep_rate: InitVar[float | None] = None
    blocks: tuple[int, ...] | None = None
    prop_attn: bool = True
    protected: tuple[int, ...] | None = None
    trace_source: bool = False
    multiple_of: int = 1
    adaptive: bool | tuple[float, ...] = False
    schedule: Schedule = field(init=False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not (name := cls.__dict__.get("name")):
            return
        other = KNOWN.setdefault(name, cls)
        # A notebook may define its own again.
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"a method named {name!r} is there already: {other!r}")
        KNOWN[name] = cls

    def __post_init__(
        self, macs: float | None, speedup: float | None, keep_rate: float | None
    ) -> None:
        given = {"r": self.r, "macs": macs, "speedup": speedup, "keep_rate": keep_rate}
        schedule = _schedule(given, self.standard)
        self._set(
            schedule=schedule,
            **schedule.as_written(),
            blocks=positions("blocks", self.blocks),
            prop_attn=flag("prop_attn", self.prop_attn),
            protected=positions("protected", self.protected),
            trace_source=flag("trace_source", self.trace_source),
            multiple_of=whole("multiple_of", self.multiple_of, least=1),
            adaptive=_adaptive(self.adaptive, self.trace_source),
        )
        self._refuse_lost_counts()
        self.check()

    # ---- what a method says -----------------------------------------------------------------

    def check(self) -> None:
        """Raises where fields are wrong or make no sense together; :meth:`_set` normalises."""

    def ready(self) -> None:
        """Raises a TomeError where something is missing without which no block can be reduced."""

    @property
    def lossy(self) -> str:
        """Why reducing tokens that are all alike changes the result, proportional attention on;
        empty where it does not.
        """
        return ""

    def most(self, tokens: int, protected: tuple[int, ...]) -> int:
        """How many of ``tokens``, the protected positions among them, a block can lose."""
        return merged_at_most(tokens, protected)

    @property
    def fused(self) -> int:
        """How many tokens a block makes of those it does not keep, beside those a rate keeps."""
        return 0

    def plan(self, tokens: int, protected: tuple[int, ...], depth: int) -> StreamPlan:
        """The plan step: how many tokens each block of a stream loses.

        Args:
            tokens: entering the stream.
            protected: positions that are never reduced.
            depth: blocks of the stream.

        Raises:
            CountsError: a ValueError, if ``r`` is a list longer than the depth, or ``blocks`` names
                one beyond it.
        """
        if self.schedule.kind == "keep_rate":
            return self._keeping(float(self.schedule.values[0]), tokens, protected, depth)
        counts = self.counts(depth)
        return plan_counts(tokens, protected, counts, self.multiple_of, self.most)

    def reduce(self, block: ReducingBlock) -> Reduction:
        """The graph-building step: which tokens a block loses, in ``tome::`` operators."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it reduces a block")

    def step(self: Own, number: int, tokens: int, depth: int) -> Own:
        """This method, reducing the more the greater a number is: from 0 for nothing to
        ``tokens * depth`` for all it can. A share of the multiply-accumulates is solved so.
        """
        if self.standard.kind == "keep_rate":
            return self.replace(keep_rate=max(1 - number / (tokens * depth), 1e-9))
        places = [i for i in range(depth) if self.blocks is None or i in self.blocks]
        counts = [0] * depth
        for order, place in enumerate(places):
            counts[place] = number // len(places) + (order < number % len(places))
        return self.replace(r=counts)

    def measured(self: Own, linearity: tuple[float, ...]) -> Own:
        """What a calibration starts from, once the blocks are measured.

        Args:
            linearity: of each block, 0 where it is linear (:mod:`tomepass.linearity`).

        Raises:
            ValueError: if the method's own fields leave nothing to find.
        """
        return self

    def variants(self, linearity: tuple[float, ...]) -> tuple[Method, ...]:
        """Others of its kind that a calibration should try, the counts aside.

        Args:
            linearity: of each block, 0 where it is linear (:mod:`tomepass.linearity`).
        """
        return ()

    # ---- what all have ----------------------------------------------------------------------

    def counts(self, depth: int) -> tuple[int, ...]:
        """Tokens asked to go in each of ``depth`` blocks, before the cap.

        Raises:
            CountsError: a ValueError, if ``r`` is a list longer than the depth, or ``blocks`` names
                one beyond it.
        """
        counts = counts_per_block(self.schedule, depth)
        if self.blocks is None:
            return counts
        places = self._places(depth)
        return tuple(count if i in places else 0 for i, count in enumerate(counts))

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON types; :func:`method_from_dict` reads it back."""
        common = ("r", "prop_attn", "protected", "trace_source", "multiple_of")
        data: dict[str, Any] = {"method": self.name}
        for own in _given(self):
            value = self.schedule if own.name == "r" else getattr(self, own.name)
            if own.name in common or value != own.default:
                data[own.name] = _to_json(value)
        return data

    @classmethod
    def fields_from(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Fields as :meth:`to_dict` wrote them, back in their own types."""
        fields = dict(data)
        if "r" in fields:
            fields["r"] = Schedule.from_json(fields["r"])
        return fields

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Method:
        """The configuration that :meth:`to_json` wrote."""
        return method_from_dict(json.loads(text))

    def replace(self: Own, **changes: Any) -> Own:
        """A copy with some fields changed; ``macs``, ``speedup`` or ``keep_rate`` takes the place
        of ``r``.
        """
        fields = {f.name: getattr(self, f.name) for f in _given(self)} | {"r": self.schedule}
        if any(target in changes for target in ("keep_rate", *TARGETS)):
            del fields["r"]
        return type(self)(**(fields | changes))

    def __repr__(self) -> str:
        shown = [repr(self.schedule)]
        for own in _given(self):
            if own.name != "r" and (value := getattr(self, own.name)) != own.default:
                shown.append(f"{own.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _set(self, **fields: Any) -> None:
        # A frozen dataclass normalises through object.__setattr__, once, when it is made.
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _refuse_lost_counts(self) -> None:
        if self.blocks is None or self.schedule.kind != "list":
            return
        counts = enumerate(self.schedule.values)
        if lost := [i for i, count in counts if count and i not in self.blocks]:
            raise ValueError(
                f"{self.schedule!r} asks for tokens of blocks {lost}, which blocks={self.blocks} "
                "leaves out"
            )

    def _places(self, depth: int) -> tuple[int, ...]:
        """The blocks that reduce, where they are not all."""
        places = self.blocks
        if places is None:
            return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))
        if outside := [i for i in places if i >= depth]:
            raise CountsError(f"blocks={places} names {outside}, the model has {depth} blocks")
        return places

    def _keeping(
        self, rate: float, tokens: int, protected: tuple[int, ...], depth: int
    ) -> StreamPlan:
        counts: list[int] = []
        free = tokens - len(protected)
        for index in range(depth):
            kept = free
            if rate < 1 and index in self._places(depth):
                kept = min(free, max(1, math.ceil(free * rate)) + self.fused)
            current = free + len(protected)
            counts.append(min(free - kept, self.most(current, held_at(current, tokens, protected))))
            free -= counts[-1]
        return plan_counts(tokens, protected, tuple(counts), self.multiple_of, self.most)


def method_from_dict(data: dict[str, Any]) -> Method:
    """The method that ``to_dict`` wrote.

    Raises:
        TomeError: on an unknown method or field.
    """
    fields = dict(data)
    if (name := fields.pop("method", "tome")) not in KNOWN:
        raise TomeError(f"unknown method {name!r}; known: {', '.join(map(repr, sorted(KNOWN)))}")
    kind = KNOWN[name]
    known = {own.name for own in _given(kind)}
    if unknown := sorted(set(fields) - known):
        raise TomeError(f"unknown fields {unknown} of method {name!r}; known: {sorted(known)}")
    return kind(**kind.fields_from(fields))


def _given(method: Method | type[Method]) -> list[dataclasses.Field[Any]]:
    """The fields that a method is made of, without what follows from them."""
    return [own for own in dataclasses.fields(method) if own.init]


def _schedule(given: dict[str, Any], standard: Schedule) -> Schedule:
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise TypeError(f"give one of r, macs, speedup and keep_rate, got {' and '.join(names)}")
    if not names:
        return standard
    return parse_schedule(given["r"]) if names == ["r"] else parse_target(names[0], given[names[0]])


def _adaptive(value: Any, trace_source: bool) -> bool | tuple[float, ...]:
    if value is not False and trace_source:
        raise ValueError(
            "trace_source=True and adaptive=... make no sense together: images of one batch have "
            "different sequences"
        )
    if isinstance(value, bool):
        return value
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"adaptive must be True, False or thresholds, got {value!r}")
    limits = tuple(number("adaptive", limit, -1, 1) for limit in value)
    if len(limits) != 2 or limits[0] > limits[1]:
        raise ValueError(f"adaptive takes two rising thresholds, got {value!r}")
    return limits


def _to_json(value: Any) -> Any:
    if hasattr(value, "to_json_types"):
        return value.to_json_types()
    if isinstance(value, Schedule):
        return value.to_json()
    return list(value) if isinstance(value, tuple) else value
