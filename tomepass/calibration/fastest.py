"""Plans chosen by measuring: which schedule is fastest here, or that merging does not pay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch.utils._pytree as pytree
from torch import Tensor, nn

from tomepass.calibration.values import Plan, Tried
from tomepass.errors import TomeError, no_foreign_errors
from tomepass.handover.applying import explain
from tomepass.handover.compiling.backend import options_of
from tomepass.handover.compiling.inner import inner_name, resolve_inner
from tomepass.handover.merged import call_of, of_one_graph
from tomepass.handover.refusing import check_model
from tomepass.kernels.attention import padded_to
from tomepass.measuring.environment import environment
from tomepass.measuring.measure import check_rounds, measure, steps
from tomepass.measuring.values import Measurement
from tomepass.methods import Method, RLike, ToMe
from tomepass.model.unmerged import check_values
from tomepass.printing.style import progress_bar

if TYPE_CHECKING:
    from rich.progress import Progress

    from tomepass.handover.compiling.inner import Inner


Proposed = TypeVar("Proposed")

Found = TypeVar("Found")

_ATTEMPTS = 4

# A goal missed by rounding alone would be tried again with the same counts.
_MARGIN = 1.01


@no_foreign_errors("plan for the model")
def plan(
    model: nn.Module,
    inputs: Any,
    *,
    r: RLike | None = None,
    macs: float | None = None,
    speedup: float | None = None,
    inner: Inner = "inductor",
    inner_options: Mapping[str, Any] | None = None,
    rounds: int = 5,
    progress: bool = True,
) -> Plan:
    """Measures a few schedules on this machine, merged against unmerged, both compiled alike.

    With ``r`` or ``macs`` it tries that schedule and others of equal or fewer multiply-accumulates
    (counts rounded for matrix units; twice as many tokens in every second block) and returns the
    fastest. With ``speedup`` it merges more, step by step, until so much is measured, and returns
    the gentlest that reached it. Where nothing is faster than the unmerged model it says so:
    ``ToMe(r=0)``.

    Args:
        model: in eval mode, on the device to plan for; or an applied one.
        inputs: as they will come: batch, resolution and dtype all count.
        r: as in :class:`ToMe`; 16 if none of the three is given.
        macs: the share of the unmerged multiply-accumulates to keep at most.
        speedup: what to reach, measured.
        inner: the backend that compiles both forms.
        inner_options: its options, for example ``{"freezing": True}``.
        rounds: interleaved samples of each form, for each schedule.
        progress: show a bar on standard error.

    Raises:
        TomeError: if the model cannot be merged, or is in training mode; if the model itself,
            compiled by that backend, raises for these inputs, which is then its cause; or if they
            or the model are on the meta device.
        TypeError, ValueError: on a wrong target, or more than one, or another argument of a wrong
            type.
    """
    asked = ToMe(r, macs=macs, speedup=speedup)
    options = options_of(inner_options)
    resolve_inner(inner, {})  # a missing backend is better said before the work
    check_rounds(rounds)
    if of_one_graph(model):
        model = model._tome.model
    check_model(model)
    check_values(model, call_of(model, inputs), "plan")

    with progress_bar(progress) as bar:
        tried = _all_tried(asked, _Measuring(model, inputs, inner, options, rounds, bar))
    return _chosen(asked, tried, inner)


@dataclass(frozen=True)
class _Measuring:
    """What all schedules are measured with: :func:`measure` says what each means."""

    model: nn.Module
    inputs: Any
    inner: Inner
    options: Mapping[str, Any]
    rounds: int
    bar: Progress

    def attempt(self, method: Method) -> Tried:
        """Measures one schedule."""
        what = repr(method)
        task = self.bar.add_task(what, total=steps(self.rounds))
        found = measure(
            self.model,
            self.inputs,
            method,
            inner=self.inner,
            inner_options=self.options,
            rounds=self.rounds,
            progress=lambda step: self.bar.update(task, description=f"{what}: {step}", advance=1),
        )
        return _tried(found)


def _all_tried(asked: Method, measuring: _Measuring) -> tuple[Tried, ...]:
    """More and more merged until a speed-up that was asked for is measured, else alternatives."""
    model, inputs = measuring.model, measuring.inputs
    counted = _counted(model, inputs)
    if asked.schedule.kind != "speedup":
        return tuple(measuring.attempt(method) for method in _alternatives(asked, counted))
    goal, multiple = asked.schedule.values[0], _multiple(model, inputs)

    def propose(ideal: float) -> Method:
        return counted(ToMe(speedup=ideal, multiple_of=multiple))

    return tuple(approach(goal, propose, measuring.attempt, lambda found: found.speedup))


def _counted(model: nn.Module, inputs: Any) -> Callable[[Method], Method]:
    """A method with the counts a model gets, where it has one stream."""

    def counted(method: Method) -> Method:
        report = explain(model, method, example_inputs=inputs)
        if not report.ok:
            raise report.refusal()
        if len(report.streams) > 1:
            return method
        return method.replace(r=[block.r for block in report.blocks], multiple_of=1)

    return counted


def _alternatives(asked: Method, counted: Callable[[Method], Method]) -> list[Method]:
    """The schedule asked for, and others that leave no more tokens after any second block."""
    first = counted(asked)
    found = [first]
    for multiple in (8, 16):
        found.append(counted(asked.replace(multiple_of=multiple)))
    if first.schedule.kind == "list":
        counts = [int(count) for count in first.schedule.values]
        pairs = [sum(counts[i : i + 2]) for i in range(0, len(counts), 2)]
        spread = [count for pair in pairs for count in (pair, 0)][: len(counts)]
        found.append(counted(first.replace(r=spread)))
    return list(dict.fromkeys(found))


def approach(
    goal: float,
    propose: Callable[[float], Proposed],
    attempt: Callable[[Proposed], Found],
    speed: Callable[[Found], float],
) -> list[Found]:
    """Asks for more until a speed-up is measured: what is missing now is asked for next.

    Args:
        goal: the speed-up.
        propose: what should reach one by the arithmetic; a TomeError where nothing can.
        attempt: measures it.
        speed: that was measured.
    """
    found: list[Found] = []
    ideal = goal
    for _ in range(_ATTEMPTS):
        try:
            proposed = propose(ideal)
        except TomeError:
            if not found:
                raise
            break
        found.append(attempt(proposed))
        reached = speed(found[-1])
        if reached >= goal:
            break
        ideal *= max(goal / reached, 1.0) * _MARGIN
    return found


def _chosen(asked: Method, tried: tuple[Tried, ...], inner: Inner) -> Plan:
    best = max(tried, key=lambda t: t.speedup)
    where = tuple(sorted(environment().items()))
    name = inner_name(inner)
    if best.speedup <= 1.0:
        why = f"do not merge: the fastest of {len(tried)} schedules ran at {best.speedup:.2f}x"
        return Plan(ToMe(0), 1.0, why, tried, name, where)
    why = f"{best.speedup:.2f}x measured, {1 / best.macs:.2f}x by the arithmetic"
    if asked.schedule.kind == "speedup" and best.speedup < (goal := asked.schedule.values[0]):
        why += f"; {goal:g}x was asked for and not reached"
    return Plan(best.method, best.speedup, why, tried, name, where)


def _tried(found: Measurement) -> Tried:
    ratio = found.ratio
    method = found.settings.method
    return Tried(method, 1 / found.ratio_ideal, ratio.median, ratio.low, ratio.high)


def _multiple(model: nn.Module, inputs: Any) -> int:
    """The multiple of tokens that the model's attention is fastest with."""
    tensors = (v for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor))
    state = next(model.parameters(), None)
    leaf = state if state is not None else next(tensors)
    return padded_to(leaf.device, leaf.dtype)
