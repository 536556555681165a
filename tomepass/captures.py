"""What has been captured of one model: found by many threads, made by one, never too many."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from tomepass.alone import one_at_a_time
from tomepass.errors import TomeError

if TYPE_CHECKING:
    from tomepass.module import Applied

CAPTURES = 64
"""How many captures of a model are kept; the one longest out of use goes first."""

Make = Callable[[nn.Module, dict[str, Any], str], "Applied"]
Signature = tuple[Any, ...]

_clock = itertools.count(1)


@dataclass(eq=False)
class _Kept:
    """A capture, and when it was last used."""

    signature: Signature
    applied: Applied
    used: int


@dataclass(eq=False)
class Captures:
    """The captures of one model, by call signature.

    Any number of threads may ask. One captures; those that need the same capture wait for it, the
    others go on with theirs.

    Args:
        make: captures a model for a call of one of its methods, and rewrites it.
        limit: how many are kept; may be changed at any time.
    """

    make: Make
    limit: int = CAPTURES
    # Replaced, never changed: threads look things up without a lock.
    _kept: dict[Signature, tuple[_Kept, ...]] = field(default_factory=dict)
    # What compiled code has taken in stays, by number.
    _compiled: dict[int, Applied] = field(default_factory=dict)
    _signatures: dict[Signature, int] = field(default_factory=dict)

    def get(self, model: nn.Module, call: dict[str, Any], method: str = "forward") -> Applied:
        """The capture of a method of the model, made if there is none.

        Args:
            model: whose method it is, as it is now.
            call: keyword inputs of the method.
            method: its name.

        Raises:
            TomeError: if it cannot be captured, or if it would have to be while Dynamo traces.
        """
        signature = signature_of(model, call, method)
        if torch.compiler.is_dynamo_compiling():
            # Looking the signature up is what makes Dynamo guard on the sizes in it.
            known = self._signatures.get(signature, -1)
            return self._compiled[_taken_in(self, known)]
        if (found := self.find(signature)) is not None:
            return found
        with one_at_a_time():
            if (found := self.find(signature)) is not None:
                return found  # made by another thread meanwhile
            applied = self.make(model, call, method)
            self._add(_Kept(signature, applied, next(_clock)))
            return applied

    def find(self, signature: Signature) -> Applied | None:
        """The capture for a signature of the model as it is now, if there is one."""
        for kept in self._kept.get(signature, ()):
            if kept.applied.capture.guards.hold():
                kept.used = next(_clock)
                return kept.applied
        return None

    def change(self, change: Callable[[Applied], Applied]) -> None:
        """Puts something else in the place of each."""
        for kept in self._all():
            kept.applied = change(kept.applied)

    def clear(self) -> None:
        """Forgets all; what is needed is captured again."""
        self._kept = {}

    def __len__(self) -> int:
        return len(self._all())

    def __iter__(self) -> Iterator[Applied]:
        return iter([kept.applied for kept in self._all()])

    def _all(self) -> list[_Kept]:
        return [kept for group in self._kept.values() for kept in group]

    def _add(self, new: _Kept) -> None:
        used = sorted((*self._all(), new), key=lambda kept: kept.used, reverse=True)
        groups: dict[Signature, tuple[_Kept, ...]] = {}
        for kept in used[: max(self.limit, 1)]:
            groups[kept.signature] = (*groups.get(kept.signature, ()), kept)
        self._kept = groups
        self._signatures.setdefault(new.signature, len(self._signatures))

    def _take_in(self, known: int) -> int | None:
        """The number of a capture that compiled code keeps, by the number of its signature."""
        signature = next((s for s, number in self._signatures.items() if number == known), None)
        applied = None if signature is None else self.find(signature)
        if applied is None:
            return None
        _recompile_unless(applied.capture.guards.hold)
        for number, taken in self._compiled.items():
            if taken is applied:
                return number
        self._compiled[len(self._compiled)] = applied
        return len(self._compiled) - 1


def signature_of(model: nn.Module, call: dict[str, Any], method: str) -> Signature:
    """What tells captures apart before the model is asked: the method, the inputs, its type."""
    leaves = pytree.tree_leaves(call)
    first = next((v for v in leaves if isinstance(v, Tensor) and v.ndim), None)
    batch = 0 if first is None else first.shape[0]
    state = next(model.parameters(), None)
    return (
        method,
        None if state is None else (state.dtype, _device(state)),
        tuple((name, _shape_of(value, batch)) for name, value in call.items()),
    )


def _shape_of(value: Any, batch: int) -> Any:
    """What a capture depends on in an input: all but the batch size and the tensor's values."""
    if isinstance(value, Tensor):
        batched = value.ndim > 0 and value.shape[0] == batch
        sizes = value.shape[1:] if batched else value.shape
        return (batched, tuple(int(s) for s in sizes), value.dtype, _device(value))
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(_shape_of(v, batch) for v in value))
    if isinstance(value, dict):
        return ("dict", *((name, _shape_of(v, batch)) for name, v in value.items()))
    return repr(value)


def _device(tensor: Tensor) -> tuple[str, int | None]:
    return (tensor.device.type, tensor.device.index)


class NotPreparedError(TomeError, AssertionError):
    """Dynamo raises an AssertionError as it is and wraps every other error."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _taken_in(captures: Captures, known: int) -> int:
    """Runs while Dynamo traces, not when what it traced runs."""
    number = captures._take_in(known)
    if number is None:
        raise NotPreparedError(
            "this call signature was not captured before compiling, or the model has changed "
            "since, and a capture inside a compiled region is impossible",
            advice="call merged.prepare(inputs) with inputs like these first",
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
