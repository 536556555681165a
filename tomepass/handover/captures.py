"""Keeps the captures of one model, one for each kind of call, and makes those that are missing.

Calls may come from many threads: one captures, those that need the same capture wait for it. The
number of captures kept is limited; the one longest out of use is dropped first.
"""

from __future__ import annotations

import itertools
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import SymInt, Tensor, nn

from tomepass.capture.fidelity import can_be_held
from tomepass.errors import NotCaptured
from tomepass.model.alone import one_at_a_time
from tomepass.model.batches import Form, first_of, forms

if TYPE_CHECKING:
    from tomepass.handover.applied import Applied


CAPTURES = 64
"""How many captures of a model are kept; the one longest out of use goes first."""


Make = Callable[[nn.Module, dict[str, Any], str], "Applied"]

Check = Callable[["Applied", nn.Module, dict[str, Any], str], "Applied"]

Signature = tuple[Any, ...]

_clock = itertools.count(1)

_LOG = logging.getLogger("tomepass")

_stores: weakref.WeakValueDictionary[int, Captures] = weakref.WeakValueDictionary()


@dataclass(eq=False)
class _Kept:
    """A capture, when it was last used, and how often it is still to be held against the model."""

    signature: Signature
    applied: Applied
    used: int
    checks: int = 1


@dataclass(eq=False)
class Captures:
    """The captures of one model, by call signature.

    Any number of threads may ask. One captures; those that need the same capture wait for it, the
    others go on with theirs. An answer is always about the model as it is now.

    Args:
        make: captures a model for a call of one of its methods, and rewrites it.
        check: raises, or gives what to run instead, where a capture is not the model for a call.
        limit: how many are kept.
    """

    make: Make
    check: Check
    limit: int = CAPTURES
    # Replaced, never changed: threads look things up without a lock.
    _kept: dict[Signature, tuple[_Kept, ...]] = field(default_factory=dict)
    # What compiled code has taken in stays, by number, and so do the signatures it looks up.
    _compiled: dict[int, Applied] = field(default_factory=dict)
    _numbers: dict[Signature, int] = field(default_factory=dict)
    # What a function that Dynamo takes for constant is given are constants: numbers.
    _place: int = field(default_factory=lambda: next(_clock))

    def __post_init__(self) -> None:
        _stores[self._place] = self

    def get(self, model: nn.Module, call: dict[str, Any], method: str = "forward") -> Applied:
        """The capture of a method of the model as it is now, made if there is none.

        Args:
            model: whose method it is.
            call: keyword inputs of the method.
            method: its name.

        Raises:
            TomeError: if it cannot be captured, if the capture is another function than the model,
                or if it would have to be made while Dynamo traces.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._compiled[_taken_in(self._place, self._number(model, call, method))]
        if (kept := self._find(model, call, method)) is None:
            with one_at_a_time():
                if (kept := self._find(model, call, method)) is None:
                    return self._new(model, call, method).applied
                # Another thread has made it meanwhile.
        if kept.checks and can_be_held(call):
            with one_at_a_time():
                self._hold(kept, model, call, method)
        return kept.applied

    def change(self, change: Callable[[Applied], Applied]) -> None:
        """Puts something else in the place of each."""
        for kept in self._all():
            kept.applied = change(kept.applied)

    def latest(self) -> Applied | None:
        """The one that was used last; None where there is none."""
        kept = max(self._all(), key=lambda kept: kept.used, default=None)
        return None if kept is None else kept.applied

    def clear(self) -> None:
        """Forgets all; what is needed is captured again."""
        self._kept = {}

    def __len__(self) -> int:
        return len(self._all())

    def __iter__(self) -> Iterator[Applied]:
        return iter([kept.applied for kept in self._all()])

    def _all(self) -> list[_Kept]:
        return [kept for group in self._kept.values() for kept in group]

    def _find(self, model: nn.Module, call: dict[str, Any], method: str) -> _Kept | None:
        # A capture for which the first tensor alone is batched was made knowing the others' sizes.
        # One with a batch of its own is asked last: reading a symbolic batch would fix it.
        asked = forms(call)[::-1]
        for form in sorted(asked, key=lambda form: isinstance(form.size, SymInt)):
            for kept in self._kept.get(signature_of(model, call, method, form), ()):
                if kept.applied.capture.stands_for(call):
                    kept.used = next(_clock)
                    return kept
        return None

    def _new(self, model: nn.Module, call: dict[str, Any], method: str) -> _Kept:
        started = time.perf_counter()
        applied = self.make(model, call, method)
        _tell_of(applied, f"{type(model).__name__}.{method}", time.perf_counter() - started)
        signature = signature_of(model, call, method, applied.capture.form)
        new = _Kept(signature, applied, next(_clock))
        used = sorted((*self._all(), new), key=lambda kept: kept.used, reverse=True)
        groups: dict[Signature, tuple[_Kept, ...]] = {}
        for kept in used[: max(self.limit, 1)]:
            groups[kept.signature] = (*groups.get(kept.signature, ()), kept)
        self._kept = groups
        told = "kept: %d of at most %d captures, %d dropped"
        _LOG.info(told, len(self), self.limit, len(used) - len(self))
        self._numbers.setdefault(signature, len(self._numbers))
        return new

    def _hold(self, kept: _Kept, model: nn.Module, call: dict[str, Any], method: str) -> None:
        """Holds a capture against the model on inputs it was not made with: the first real ones."""
        if kept.checks:
            kept.applied = self.check(kept.applied, model, call, method)
            kept.checks -= 1

    def _number(self, model: nn.Module, call: dict[str, Any], method: str) -> int:
        """The number of a call's signature, -1 if there is none."""
        # Looking a signature up makes Dynamo guard on the sizes in it: the batch comes last.
        for form in forms(call):
            signature = signature_of(model, call, method, form)
            if signature in self._numbers:
                return self._numbers[signature]
        return -1

    def _take_in(self, known: int) -> int | None:
        """The number of a capture that compiled code keeps, by the number of its signature."""
        signature = next((s for s, number in self._numbers.items() if number == known), None)
        group = () if signature is None else self._kept.get(signature, ())
        applied = next((k.applied for k in group if k.applied.capture.guards.hold()), None)
        if applied is None:
            return None
        _recompile_unless(applied.capture.guards.hold)
        for number, taken in self._compiled.items():
            if taken is applied:
                return number
        self._compiled[len(self._compiled)] = applied
        return len(self._compiled) - 1


def signature_of(model: nn.Module, call: dict[str, Any], method: str, form: Form) -> Signature:
    """What tells captures apart before the model is asked: the method, the inputs, its type."""
    state: Tensor | None = next(model.parameters(), None)
    state = _of_a_replica(model) if state is None else state
    first = first_of(call)
    return (
        method,
        None if state is None else (state.dtype, _device(state)),
        tuple((name, _shape_of(value, first, form)) for name, value in call.items()),
    )


def _of_a_replica(model: nn.Module) -> Tensor | None:
    """A weight of what ``DataParallel`` makes for a device: a plain tensor there."""
    held = (value for module in model.modules() for value in vars(module).values())
    return next((value for value in held if isinstance(value, Tensor)), None)


def _shape_of(value: Any, first: Tensor | None, form: Form) -> Any:
    """What a capture depends on in an input: all but the batch size and the tensor's values."""
    if isinstance(value, Tensor):
        batched = form.batched(value, first)
        sizes = value.shape[1:] if batched else value.shape
        return (batched, tuple(int(s) for s in sizes), value.dtype, _device(value))
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(_shape_of(v, first, form) for v in value))
    if isinstance(value, dict):
        return ("dict", *((name, _shape_of(v, first, form)) for name, v in value.items()))
    return repr(value)


def _tell_of(applied: Applied, what: str, seconds: float) -> None:
    """Logs what was captured, and what was chosen for it."""
    report = applied.report
    _LOG.info("captured: %s for %s in %.2f s", what, report.inputs, seconds)
    _LOG.info("chosen: %r%s", report, "".join(f"; {c}" for c in report.paths + report.kernels))


def _device(tensor: Tensor) -> tuple[str, int | None]:
    return (tensor.device.type, tensor.device.index)


class NotPreparedError(NotCaptured, AssertionError):
    """Dynamo raises an AssertionError as it is and wraps every other error."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _taken_in(store: int, known: int) -> int:
    """Runs while Dynamo traces, not when what it traced runs."""
    number = _stores[store]._take_in(known)
    if number is None:
        raise NotPreparedError(
            "this call signature was not captured before compiling, or the model has changed "
            "since, and a capture inside a compiled region is impossible",
            advice="call merged.tome.prepare(inputs) with inputs like these first",
        )
    return number


def _recompile_unless(holds: Callable[[], bool]) -> None:
    """Has Dynamo ask at each call of what it compiles now, and trace again on a no."""
    from torch._dynamo.guards import install_guard
    from torch._dynamo.source import GlobalStateSource
    from torch._guards import Guard

    def tome_capture(builder: Any, guard: Any) -> None:
        words = ["the model is as tomepass captured it"]
        builder.guard_manager.root.add_lambda_guard(lambda _: holds(), words, guard.user_stack)

    install_guard(Guard(GlobalStateSource(), tome_capture))
