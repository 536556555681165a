"""Calibration: which method, and how many tokens in which block, on a few images without labels."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache as remembered
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tomepass.calibration.fastest import approach
from tomepass.calibration.judging import Judge
from tomepass.calibration.measurements import (
    Memory,
    cache_path,
)
from tomepass.calibration.shapes import Shape, fitted
from tomepass.calibration.values import Calibration, Candidate, Plan
from tomepass.errors import TomeError, no_foreign_errors, the_users_own
from tomepass.handover.choices import check_one_graph
from tomepass.handover.compiling.backend import options_of
from tomepass.handover.compiling.inner import inner_name, resolve_inner
from tomepass.measuring.environment import environment
from tomepass.measuring.measure import measure
from tomepass.methods import Method, ToMe
from tomepass.planning.solving import even
from tomepass.printing.style import progress_bar

if TYPE_CHECKING:
    from rich.progress import Progress

    from tomepass.handover.compiling.inner import Inner


_SHAPES = (
    Shape(),
    Shape(start=1, power=0.5),
    Shape(start=2, ramp=True, power=1.0, last="most"),
)


@no_foreign_errors("calibrate for the model")
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    macs: float | None = None,
    speedup: float | None = None,
    methods: Method | Sequence[Method] | None = None,
    held_out: float = 0.25,
    seed: int = 0,
    cache: str | Path | None = None,
    inner: Inner = "inductor",
    inner_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Plan:
    """Finds the method and the counts a block that change a model's outputs least, untrained.

    On some of the images it measures how linear each block is and how much the output suffers
    when one block alone loses tokens; then it tries shapes of the schedule and the variants of the
    methods, all at the same multiply-accumulates, and keeps what diverges least. Labels are not
    needed. The images held out have no say; the plan reports what they say.

    Args:
        model: in eval mode; or an applied one.
        batches: of inputs as they will come, 128 images or so in all, alike but for their length.
            They are read once; what the iterable itself raises comes through as it is.
        macs: the share of the unmerged multiply-accumulates to keep, as in 0.6.
        speedup: instead: the measured ratio to reach, compiled, on the first batch.
        methods: one or more to choose from, without counts, which are what is looked for; by
            default ToMe and its variants.
        held_out: the share of the images that have no say.
        seed: of the choice of these.
        cache: a JSON file that keeps what was measured, so that a run that was broken off goes on:
            speed-ups too, for the same machine, threads, versions and a backend given by name.
        inner: the backend that compiles, with ``speedup`` alone.
        inner_options: its options, with ``speedup`` alone.
        progress: show a bar on standard error.

    Returns:
        a plan with a :class:`Calibration`; ``apply``, ``explain`` and ``TomeBackend`` take it.

    Raises:
        TypeError: if not one of macs and speedup is given, or on an argument of a wrong type.
        ValueError: if they, or ``held_out``, are out of range, or options make no sense together.
        TomeError: if the model cannot be merged, the goal cannot be reached, a method or the model
            is adaptive, there are fewer than four images, batches differ in more than their length,
            or the cache is broken, another's, or cannot be read or written; if the model itself
            raises for a batch, which is then its cause, or answers with what is not finite.
    """
    goal = ToMe(macs=macs, speedup=speedup).schedule.macs
    if goal is None:
        raise TypeError("give the goal: macs=0.6 or speedup=1.5")
    _check_numbers(held_out, seed)
    options = _options(inner, inner_options, None if speedup is not None else f"macs={macs!r}")
    asked = _asked(methods)
    path = None if cache is None else cache_path(cache)
    judge = Judge(model, batches)
    with progress_bar(progress) as bar:
        search = _Search(judge, asked, held_out, seed, path, bar)
        if speedup is None:
            return search.run(goal)
        return _until_measured(search, float(speedup), inner, options)


def _asked(methods: Method | Sequence[Method] | None) -> tuple[Method, ...]:
    if methods is None:
        return (ToMe(importance="class_attention"),)
    if isinstance(methods, Method):
        methods = (methods,)
    if not isinstance(methods, Iterable):
        raise TypeError(f"methods must be one or more tomepass methods, got {methods!r}")
    with the_users_own():
        found = tuple(methods)
    if not found or not all(isinstance(method, Method) for method in found):
        raise TypeError(f"methods must be one or more tomepass methods, got {methods!r}")
    for method in found:
        check_one_graph(method, "calibrate")
        own = {"counts": method.schedule != method.standard, "blocks=": method.blocks is not None}
        for what in (what for what, given in own.items() if given):
            raise ValueError(
                f"the {what} of {method!r} and the goal of calibrate make no sense together: which "
                f"block loses how many is what it finds; give methods={type(method).__name__}(...) "
                f"without {what}"
            )
    return found


class _Search:
    """Candidates held against the tuning images, each once."""

    def __init__(
        self,
        judge: Judge,
        asked: Sequence[Method],
        held_out: float,
        seed: int,
        cache: Path | None,
        bar: Progress,
    ) -> None:
        self.judge, self.asked, self.seed, self.bar = judge, asked, seed, bar
        order = torch.randperm(judge.images, generator=torch.Generator().manual_seed(seed))
        kept = max(1, round(judge.images * held_out))
        if judge.images < 4 or kept >= judge.images:
            raise TomeError(
                f"{judge.images} images are too few to calibrate on and hold some out",
                advice="give at least four; 128 are enough",
            )
        self.held, self.tuned = order[:kept].tolist(), order[kept:].tolist()
        self.memory = Memory(judge, cache)
        stream = max(judge.costs.streams, key=lambda s: len(s.stream.blocks))
        self.stream, self.depth = stream, judge.depth
        self.tokens, self.protected = stream.plan.tokens, len(stream.plan.protected)
        self.alone = max(1, (self.tokens - self.protected) // 8)

    def say(self, text: str) -> None:
        """On a bar without an end: what a search tries depends on what it finds."""
        self.bar.update(self._open_end, description=text)

    @cached_property
    def _open_end(self) -> Any:
        return self.bar.add_task("", total=None)

    def divergence(self, method: Method) -> float:
        """On the tuning images; infinite where it is no number, which nothing is less than."""
        found = self.memory.outputs(method).score(self.tuned).divergence
        return math.inf if math.isnan(found) else found

    @cached_property
    def linearity(self) -> tuple[float, ...]:
        """Of each block."""
        self.say("measuring how linear each block is")
        return self.memory.linearity(self.stream)

    @cached_property
    def starts(self) -> list[Method]:
        """What was asked for, as far as the blocks' linearity decides it."""
        return [method.measured(self.linearity) for method in self.asked]

    @cached_property
    def sensitivity(self) -> tuple[float, ...]:
        """The divergence when one block alone loses tokens."""
        blocks = self.bar.track(range(self.depth), description="one block alone")
        return tuple(self._alone(self.starts[0], index, self.alone) for index in blocks)

    def run(self, macs: float) -> Plan:
        """The whole search at one share of the multiply-accumulates."""
        linearity, sensitivity = self.linearity, self.sensitivity
        tried: dict[Method, float] = {}
        for method in self.starts:
            self._search(method, macs, linearity, tried)
        if not tried:
            even(self.starts[0], macs, self.judge.share, self.tokens, self.depth)  # says why
            raise TomeError(f"no schedule leaves {macs} of the multiply-accumulates")
        chosen = min(tried, key=lambda m: tried[m])
        if math.isinf(tried[chosen]):
            raise TomeError(
                f"all {len(tried)} schedules tried give outputs that are not finite",
                advice="calibrate in float32 or bfloat16, whose range is wider than float16's",
            )
        plain = even(ToMe(), macs, self.judge.share, self.tokens, self.depth)
        found = self.memory.outputs(chosen)
        calibration = Calibration(
            macs=self.judge.share(chosen),
            tuned=found.score(self.tuned),
            held_out=found.score(self.held),
            even=self.memory.outputs(plain).score(self.held),
            linearity=linearity,
            sensitivity=sensitivity,
            alone=self.alone,
            tried=tuple(Candidate(m, self.judge.share(m), d) for m, d in tried.items()),
            seed=self.seed,
        )
        why = _why(calibration)
        logging.getLogger("tomepass").info("chosen: %r, %s", chosen, why)
        return Plan(chosen, None, why, (), "", _where(), calibration)

    def _alone(self, method: Method, index: int, r: int) -> float:
        counts = [0] * self.depth
        counts[index] = r
        return self.divergence(method.replace(r=counts, blocks=None))

    def _search(
        self, method: Method, macs: float, linearity: tuple[float, ...], tried: dict[Method, float]
    ) -> None:
        """Shapes for the method, then its variants in the best one, then its neighbours."""

        @remembered  # a walk asks for the shape it stands in again and again
        def attempt(candidate: Method, shape: Shape) -> float:
            share = self.judge.share
            of_shape = (macs, share, self.tokens, self.protected, self.depth)
            counted = fitted(shape, candidate, *of_shape)
            if counted is None:
                return float("inf")
            if counted not in tried:
                self.say(f"{len(tried)} tried, now {counted!r}")
                tried[counted] = self.divergence(counted)
            return tried[counted]

        shape = min(_SHAPES, key=lambda s: attempt(method, s))
        shape = self._walked(method, shape, attempt)
        best = method
        while True:
            variants = (best, *best.variants(linearity))
            better = min(variants, key=lambda v: attempt(v, shape))
            if better == best:
                break
            best = better
        if best != method:
            self._walked(best, shape, attempt)

    def _walked(
        self, method: Method, shape: Shape, attempt: Callable[[Method, Shape], float]
    ) -> Shape:
        """Downhill from shape to shape."""
        while True:
            nearby = min(shape.neighbours(self.depth), key=lambda s: attempt(method, s))
            if attempt(method, nearby) >= attempt(method, shape):
                return shape
            shape = nearby


def _check_numbers(held_out: object, seed: object) -> None:
    """Refuses what is no share and no seed."""
    if isinstance(held_out, bool) or not isinstance(held_out, Real):
        raise TypeError(f"held_out: expected a number, got {held_out!r}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: expected an int, got {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an int of 64 bits, got {seed}")
    if not 0 < float(held_out) < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out!r}")


def _options(inner: Inner, given: Mapping[str, Any] | None, idle: str | None) -> dict[str, Any]:
    """The backend's options: none may be given where ``idle`` names a goal without compiling."""
    resolve_inner(inner, {})  # a missing backend is better said before the work
    options = options_of(given)
    if idle is not None and (inner != "inductor" or options):
        name = "inner" if inner != "inductor" else "inner_options"
        raise ValueError(
            f"{name}= and {idle} make no sense together: only speedup= compiles anything"
        )
    return options


def _until_measured(
    search: _Search,
    speedup: float,
    inner: Inner,
    options: Mapping[str, Any],
) -> Plan:
    """Calibrates at fewer and fewer MACs until the speed-up is measured."""
    judge = search.judge

    def measured(plan: Plan) -> Plan:
        search.say(f"measuring the speed of {plan.method!r}")

        def find() -> float:
            how: Any = {"inner": inner, "inner_options": options, "rounds": 5}
            return measure(judge.model, judge.calls[0], plan.method, **how).ratio.median

        ratio = search.memory.speedup(plan.method, inner, options, find)
        why = f"{ratio:.2f}x measured; {plan.why}"
        return plan.replace(speedup=ratio, why=why, inner=inner_name(inner))

    plans = approach(
        speedup, lambda ideal: search.run(1 / ideal), measured, lambda p: p.speedup or 0.0
    )
    plan = plans[-1]
    if (plan.speedup or 0.0) >= speedup:
        return plan
    return plan.replace(why=f"{plan.why}; {speedup:g}x was asked for and not reached")


def _why(found: Calibration) -> str:
    return (
        f"{found.macs:.1%} of the multiply-accumulates; divergence {found.held_out.divergence:.4f} "
        f"on {found.held_out.images} images held out, {found.even.divergence:.4f} with even counts"
    )


def _where() -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(environment().items()))
