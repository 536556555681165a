"""The harness behind ``check``: may this compiled model be trusted?

Five lines, each with its figure, its tolerance and its verdict. The oracle for matches and
merges is :mod:`tomepass.reference`, which shares no code with the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import FunctionType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from tomepass import reference
from tomepass.capture.captured import read_state
from tomepass.errors import TomeError, compiling_merged, no_foreign_errors, the_users_own
from tomepass.handover.added import captured
from tomepass.handover.applied import Applied, make_applied
from tomepass.handover.applying import apply
from tomepass.handover.choices import Outputs, check_one_graph
from tomepass.handover.compiling.backend import options_of
from tomepass.handover.compiling.inner import Inner, resolve_inner
from tomepass.handover.merged import MergedModel, asked_of, call_of
from tomepass.handover.refusing import check_model
from tomepass.methods import MethodLike, RLike
from tomepass.model.batches import first_of
from tomepass.model.calls import call_with, describe_inputs
from tomepass.model.unmerged import answer_of, check_values, in_precision
from tomepass.ops.choices import CHOICES, MATCHES
from tomepass.planning.plan_graph import plan_graph
from tomepass.proof.duplicates import check_duplicates
from tomepass.proof.inputs import at_least_two, double, other_neighbours, single
from tomepass.proof.kernels import kernel_lines
from tomepass.proof.recorded import Recorded, edges_of, record, reference_lines
from tomepass.proof.replay import relative_error, replayed
from tomepass.proof.report import BLIND, CheckLine, CheckReport
from tomepass.rewriting.sweep import rewrite

FLOAT32_TOLERANCE = 1e-4

# How much further from float64 than eager the compiled graph may be, in low precision.
LOW_PRECISION_RATIO = 2.0

# Cosines closer than this, of keys that went through some blocks, rounding may tie.
_DEEP_TIE = 1e-5


@no_foreign_errors("check the model")
def check(
    model: nn.Module,
    inputs: Any,
    method: MethodLike | None = None,
    *,
    r: RLike | None = None,
    keep_rate: float | None = None,
    macs: float | None = None,
    speedup: float | None = None,
    inner: Inner = "inductor",
    inner_options: dict[str, Any] | None = None,
    outputs: Outputs = "original",
    progress: Callable[[str], None] | None = None,
) -> CheckReport:
    """Proves, on the given inputs, that the merged and compiled model computes what it should.

    1. r=0 rewritten is the original, bit for bit.
    2. Every match, merge and proportional attention agrees with a plain reference, on CUDA those
       of the kernels too.
    3. Compiled agrees with merged eager: float32 to a relative 1e-4; in lower precision, with
       the assignments of one run replayed, no further from float64 than twice eager's distance.
    4. Lossless on duplicate tokens, with a negative control that must fail.
    5. The same bits again, and an image's result independent of its neighbours.

    Some of it cannot be tried for every method, model and input: line 2 for a method that does not
    merge by bipartite matches, line 4 for one that loses something even where tokens are alike.
    ``report.unproved`` holds those lines, ``report.proved`` is True where there are none.

    Args:
        model: the model, in eval mode, or an applied one.
        inputs: a tensor, a tuple or a dict, as for :func:`tomepass.apply`.
        method: as in :func:`tomepass.apply`.
        r: short for ``method=ToMe(r=r)``, as the next three are for ``ToMe`` with them.
        keep_rate: the share of the tokens to keep at a quarter, a half and three quarters.
        macs: the share of the multiply-accumulates to keep.
        speedup: how many times as many there are unmerged.
        inner: the backend that compiles, as in :class:`TomeBackend`.
        inner_options: its options.
        outputs: as in :func:`tomepass.apply`.
        progress: called with the name of each line before it runs; what it raises comes through.

    Raises:
        TomeError: if the model cannot be merged, is in training mode, the method or model is
            adaptive, or the backend is missing; if the model itself raises for these inputs, which
            is then its cause, or returns NaN; or if they or the model are on the meta device.
        TypeError, ValueError: on a wrong ``r`` or target, more than one of them and ``method``
            given, or inputs or options of a wrong type.
    """
    model, method = asked_of(model, method, r, keep_rate=keep_rate, macs=macs, speedup=speedup)
    check_model(model)
    check_one_graph(method, "check")
    _refuse(model, progress)
    options = options_of(inner_options)
    resolve_inner(inner, {})  # a missing backend is better said before the work
    check_values(model, call_of(model, inputs), "check")
    merged = apply(model, method, example_inputs=inputs, outputs=outputs)
    subject = _Subject(model, merged, inputs, inner, options)
    lines = tuple(_all_lines(subject, progress))
    told = describe_inputs(subject.call)
    return CheckReport(type(model).__name__, method, _named(inner), told, lines)


def _refuse(model: nn.Module, progress: object) -> None:
    """Refuses a model in training mode, and a progress that cannot be called."""
    if model.training:
        raise TomeError(
            "check compares runs bit for bit and needs eval mode", advice="call model.eval() first"
        )
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be callable, got {progress!r}")


def _all_lines(subject: _Subject, progress: Callable[[str], None] | None) -> Iterator[CheckLine]:
    """Runs one line after another, each said before."""
    for name, line in _LINES.items():
        if progress is not None:
            with the_users_own():
                progress(name)
        with torch.no_grad():
            found = tuple(line(subject, name))
        yield from found


def _named(inner: Inner) -> str:
    return inner if isinstance(inner, str) else getattr(inner, "__name__", repr(inner))


class _Subject:
    """The model under test and its runs, computed once and read by the lines."""

    def __init__(
        self,
        model: nn.Module,
        merged: MergedModel,
        inputs: Any,
        inner: Inner,
        options: dict[str, Any],
    ) -> None:
        self.model, self.merged, self.inner = model, merged, inner
        self.call = merged._tome.call_of(inputs)
        self.applied: Applied = captured(merged, inputs)
        self.leaves = pytree.tree_leaves(self.call)
        compile_graph = resolve_inner(inner, options)
        self.backend = lambda gm, example: compile_graph(gm, example)

    @property
    def values(self) -> list[Any]:
        """What the graphs take: the model's state, then the inputs."""
        return [*read_state(self.model, self.applied.capture), *self.leaves]

    @property
    def graph(self) -> fx.GraphModule:
        assert self.applied.graph is not None
        return self.applied.graph

    @property
    def images(self) -> int:
        first = first_of(self.leaves)
        assert first is not None
        return int(first.shape[0])

    @property
    def low_precision(self) -> bool:
        held = [v for v in self.values if isinstance(v, Tensor) and v.is_floating_point()]
        return any(v.dtype in (torch.bfloat16, torch.float16) for v in held)

    @cached_property
    def recorded(self) -> Recorded:
        """One eager run: every match, merge and attention with its inputs."""
        return record(self.applied, self.values)

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        return self.compile(self.merged)

    def compile(self, module: nn.Module) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            return module(*args, **kwargs)

        # Dynamo counts compilations by code object: the harness's must not use up the user's.
        code = run.__code__.replace(co_name="checked")
        alone = FunctionType(code, run.__globals__, closure=run.__closure__)
        return torch.compile(alone, backend=self.backend, fullgraph=True)

    def run_compiled(self, call: dict[str, Any]) -> list[Tensor]:
        with compiling_merged(_named(self.inner)):
            return tensors(call_with(self.compiled, call))


def tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among a model's outputs."""
    return [
        v for v in pytree.tree_leaves(outputs) if isinstance(v, Tensor) and v.is_floating_point()
    ]


@contextmanager
def _fast_path_off() -> Iterator[None]:
    """Without PyTorch's fused encoder layer, which rounds otherwise than what it fuses."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _identity_line(subject: _Subject, name: str) -> Iterator[CheckLine]:
    captured = subject.applied.capture.graph
    plain = subject.merged._tome.method.replace(r=0, trace_source=False)
    rewritten = rewrite(captured, plan_graph(captured, plain)).module
    with _fast_path_off():
        theirs = tensors(answer_of(subject.model, subject.call))
    _check_numbers(subject, theirs)
    ours = tensors(rewritten(*subject.values))
    yield _bits(name, ours, theirs, "bits differ from the original's")


def _check_numbers(subject: _Subject, outputs: Sequence[Tensor]) -> None:
    """Refuses a model that answers with NaN, which equals nothing."""
    if any(bool(value.isnan().any()) for value in outputs):
        raise TomeError(
            f"{type(subject.model).__name__} itself returns NaN for inputs "
            f"{describe_inputs(subject.call)}, nothing merged, so there is nothing to compare with",
            advice="look for NaN in the inputs and the parameters, or give other inputs",
        )


def _reference_line(subject: _Subject, name: str) -> Iterator[CheckLine]:
    yield from reference_lines(subject.recorded, name)
    yield from kernel_lines(subject.applied, subject.values)


def _compiled_line(subject: _Subject, name: str) -> Iterator[CheckLine]:
    eager = tensors(call_with(subject.merged, subject.call))
    compiled = subject.run_compiled(subject.call)
    error = _worst(compiled, eager)
    if subject.low_precision:
        note = "merges flip on ties: see the next line"
        yield CheckLine(name, error, float("inf"), None, note, followed=True)
        yield _low_precision_line(subject)
    elif error > FLOAT32_TOLERANCE and not _referenced(subject):
        note = "which tokens tie cannot be told for this method: see the next line"
        yield CheckLine(name, error, FLOAT32_TOLERANCE, None, note, followed=True)
        yield _tie_line(subject)
    elif error <= FLOAT32_TOLERANCE or not (tied := _tied_images(subject)):
        yield CheckLine(name, error, FLOAT32_TOLERANCE, error <= FLOAT32_TOLERANCE)
    else:
        clear = [i for i in range(subject.images) if i not in tied]
        pairs = zip(compiled, eager, strict=True)
        rows = [(a, b) for a, b in pairs if a.ndim and a.shape[0] == subject.images]
        error = max((relative_error(a[clear], b[clear]) for a, b in rows), default=0.0)
        note = f"{len(tied)} of {subject.images} images tie within rounding: see the next line"
        yield CheckLine(name, error, FLOAT32_TOLERANCE, error <= FLOAT32_TOLERANCE, note)
        yield _tie_line(subject)


def _referenced(subject: _Subject) -> bool:
    rewritten = subject.applied.rewritten
    return rewritten is not None and rewritten.referenced


def _tied_images(subject: _Subject) -> set[int]:
    """Images in which a rounding could make other tokens merge."""
    tied: set[int] = set()
    for call in subject.recorded.calls_of(*MATCHES):
        keys, r, protected, *_ = call.args
        margin = reference.match_margin(keys, r, tuple(protected), edges=edges_of(call))
        tied |= {i for i, gap in enumerate(margin.tolist()) if gap <= _DEEP_TIE}
    return tied


def _tie_line(subject: _Subject) -> CheckLine:
    """The same assignments in the eager and the compiled graph."""
    eager, compiled, _ = _replayed(subject)
    error = _worst(compiled, eager)
    passed = error <= FLOAT32_TOLERANCE
    return CheckLine("   the same merges replayed", error, FLOAT32_TOLERANCE, passed)


def _low_precision_line(subject: _Subject) -> CheckLine:
    """One run's assignments in the eager, the compiled and a float64 graph."""
    eager, compiled, assigns = _replayed(subject)
    model = in_precision(subject.model, torch.float64)
    call = pytree.tree_map(double, subject.call)
    merged = subject.merged
    exact = make_applied(model, merged._tome.method, call, outputs=merged._tome.outputs)
    assert exact.graph is not None
    values = [*read_state(model, exact.capture), *pytree.tree_leaves(call)]
    truth = tensors(replayed(exact.graph)(*values, *assigns))
    eager_error, compiled_error = _worst(eager, truth), _worst(compiled, truth)
    ratio = compiled_error / max(eager_error, 1e-12)
    return CheckLine(
        "   replayed: distance from float64",
        ratio,
        LOW_PRECISION_RATIO,
        ratio <= LOW_PRECISION_RATIO,
        f"compiled {compiled_error:.1e}, eager {eager_error:.1e}: their ratio",
    )


def _replayed(subject: _Subject) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs of the eager and the compiled graph with the same assignments, and these."""
    assigns = pytree.tree_leaves([c.result for c in subject.recorded.calls_of(*CHOICES)])
    graph = replayed(subject.graph)
    eager = tensors(graph(*subject.values, *assigns))
    return eager, tensors(subject.compile(graph)(*subject.values, *assigns)), assigns


def _duplicates_line(subject: _Subject, name: str) -> Iterator[CheckLine]:
    model, applied, call = subject.model, subject.applied, subject.call
    if subject.low_precision:
        model = in_precision(model, torch.float32)
        call = pytree.tree_map(single, call)
        applied = make_applied(model, subject.merged._tome.method, call)
    found = check_duplicates(model, applied.capture, subject.merged._tome.method, call)
    passed: bool | None = found.error <= FLOAT32_TOLERANCE
    note = f"{found.schedule!r}; without proportional attention {found.control:.1e}"
    if found.blind is not None:
        passed, note = (None if passed else False), f"{BLIND}{found.blind}"
    yield CheckLine(name, found.error, FLOAT32_TOLERANCE, passed, note)


def _determinism_line(subject: _Subject, name: str) -> Iterator[CheckLine]:
    call = at_least_two(subject.call, subject.images)
    first, second = subject.run_compiled(call), subject.run_compiled(call)
    again = _bits(name, first, second, "a second run gives other bits")
    yield again
    name = "   whatever an image's neighbours"
    if not again.passed:
        yield CheckLine(name, 0.0, 0.0, None, f"{BLIND}not even the same batch repeats")
        return
    changed = subject.run_compiled(pytree.tree_map(other_neighbours, call))
    images = max(2, subject.images)
    alone = _own_rows(subject, call, images)
    rows = [(a[:1], b[:1]) for a, b, own in zip(first, changed, alone, strict=True) if own]
    if not rows:
        note = f"{BLIND}no output holds, for each image, what is read off that image alone"
        yield CheckLine(name, 0.0, 0.0, None, note)
        return
    ours, theirs = [a for a, _ in rows], [b for _, b in rows]
    yield _bits(name, ours, theirs, "the first image changes with the others")


def _own_rows(subject: _Subject, call: dict[str, Any], images: int) -> list[bool]:
    """Which outputs hold, for each image, what the unmerged model reads off that image alone.

    A similarity of images and texts does not.
    """
    first = tensors(answer_of(subject.model, call))
    changed = tensors(answer_of(subject.model, pytree.tree_map(other_neighbours, call)))
    pairs = zip(first, changed, strict=True)
    return [a.ndim > 0 and a.shape[0] == images and _same_bits(a[:1], b[:1]) for a, b in pairs]


def _bits(name: str, ours: Sequence[Tensor], theirs: Sequence[Tensor], otherwise: str) -> CheckLine:
    pairs = list(zip(ours, theirs, strict=True))
    same = all(_same_bits(a, b) for a, b in pairs)
    difference = max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)
    return CheckLine(name, difference, 0.0, same, "" if same else otherwise)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # NaN equals itself here: bits are compared, not numbers.
    same_nan = torch.equal(a.isnan(), b.isnan())
    return same_nan and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def _worst(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max((relative_error(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


_LINES: dict[str, Callable[[_Subject, str], Iterator[CheckLine]]] = {
    "1. r=0 is the original, bit for bit": _identity_line,
    "2. matches against the reference": _reference_line,
    "3. compiled against merged eager": _compiled_line,
    "4. lossless on duplicate tokens": _duplicates_line,
    "5. the same bits again": _determinism_line,
}
