"""The harness behind ``check``: may this compiled model be trusted?

Five lines, each with its figure, its tolerance and its verdict. The oracle for matches and
merges is :mod:`tomepass.reference`, which shares no code with the pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from tomepass import reference
from tomepass.backend import Inner, resolve_inner
from tomepass.capture import describe_inputs
from tomepass.config import RLike, ToMe, resolve_method
from tomepass.duplicates import check_duplicates
from tomepass.errors import TomeError
from tomepass.graphs import Recorder, relative_error, replayed
from tomepass.module import Applied, MergedModel, apply, make_applied, read_state
from tomepass.ops.match import match
from tomepass.ops.merge import merge
from tomepass.structure import ATTENTION

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

FLOAT32_TOLERANCE = 1e-4
# How much further from float64 than eager the compiled graph may be, in low precision.
LOW_PRECISION_RATIO = 2.0
# A merge may differ from the reference by the rounding of its weights and its result.
_MERGE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3}
_BFLOAT16_TOLERANCE = 3e-2
# Cosines closer than this are ties that rounding may break either way.
_TIE = 1e-5


@dataclass(frozen=True)
class CheckLine:
    """One line: what was measured, against what, and whether it passes (None: blind here)."""

    name: str
    figure: float
    tolerance: float
    passed: bool | None
    note: str = ""


@dataclass(frozen=True)
class CheckReport:
    """The harness's answer. ``ok`` is True if no line fails; prints as a table."""

    model: str
    method: ToMe
    inner: str
    inputs: str
    lines: tuple[CheckLine, ...]

    @property
    def ok(self) -> bool:
        """Did no line fail? A line that is blind for this model says so and does not fail."""
        return all(line.passed is not False for line in self.lines)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self) | {"method": self.method.to_dict(), "ok": self.ok}

    def __str__(self) -> str:
        from tomepass.tables import to_text

        return to_text(self)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        from tomepass.tables import check_table

        yield from check_table(self)


def check(
    model: nn.Module,
    inputs: Any,
    method: ToMe | None = None,
    *,
    r: RLike | None = None,
    inner: Inner = "inductor",
    inner_options: dict[str, Any] | None = None,
    outputs: str = "original",
    progress: Callable[[str], None] | None = None,
) -> CheckReport:
    """Proves, on the given inputs, that the merged and compiled model computes what it should.

    1. r=0 rewritten is the original, bit for bit.
    2. Every match, merge and proportional attention agrees with a plain reference.
    3. Compiled agrees with merged eager: float32 to a relative 1e-4; in lower precision, with
       the assignments of one run replayed, no further from float64 than twice eager's distance.
    4. Lossless on duplicate tokens, with a negative control that must fail.
    5. The same bits again, and an image's result independent of its neighbours.

    Args:
        model: the model, in eval mode, or an applied one.
        inputs: a tensor, a tuple or a dict, as for :meth:`MergedModel.prepare`.
        method: as in :func:`tomepass.apply`.
        r: short for ``method=ToMe(r=r)``.
        inner: the backend that compiles, as in :class:`TomeBackend`.
        inner_options: its options.
        outputs: as in :func:`tomepass.apply`.
        progress: called with the name of each line before it runs.

    Raises:
        TomeError: if the model cannot be merged, is in training mode, or the backend is missing.
    """
    if isinstance(model, MergedModel):
        if method is None and r is None:
            method = model.method
        model = model.original
    method = resolve_method(method, r)
    if model.training:
        raise TomeError(
            "check compares runs bit for bit and needs eval mode", advice="call model.eval() first"
        )
    resolve_inner(inner, {})  # a missing backend is better said before the work
    merged = apply(model, method, example_inputs=inputs, outputs=outputs)  # type: ignore[arg-type]
    subject = _Subject(model, merged, inputs, inner, inner_options or {})
    lines = []
    for name, line in _LINES.items():
        if progress is not None:
            progress(name)
        with torch.no_grad():
            lines.extend(line(subject, name))
    label = inner if isinstance(inner, str) else getattr(inner, "__name__", repr(inner))
    return CheckReport(
        type(model).__name__, method, label, describe_inputs(subject.call), tuple(lines)
    )


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
        self.model, self.merged = model, merged
        self.call = merged.bind(inputs)
        self.applied: Applied = merged.captured(inputs)
        self.leaves = pytree.tree_leaves(self.call)
        self.dtype = next(
            (v.dtype for v in self.leaves if isinstance(v, Tensor) and v.is_floating_point()),
            torch.float32,
        )
        compile_graph = resolve_inner(inner, options)
        self.backend = lambda gm, example: compile_graph(gm, example)
        self._compiled: Any = None

    @property
    def low_precision(self) -> bool:
        return self.dtype in (torch.bfloat16, torch.float16)

    def compile(self, function: Any) -> Any:
        return torch.compile(function, backend=self.backend, fullgraph=True)

    def run_compiled(self, call: dict[str, Any]) -> list[Tensor]:
        if self._compiled is None:
            # The reports count compilations of one forward: start this one afresh.
            torch._dynamo.reset()
            self._compiled = self.compile(self.merged)
        return tensors(self._compiled(**call))


def tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among a model's outputs."""
    return [
        v for v in pytree.tree_leaves(outputs) if isinstance(v, Tensor) and v.is_floating_point()
    ]


def _identity_line(subject: _Subject, name: str) -> Iterator[CheckLine]:
    plain = subject.merged.method.replace(r=0, trace_source=False)
    applied = make_applied(subject.model, plain, subject.call)
    ours = tensors(applied.run(subject.model, subject.leaves))
    theirs = tensors(subject.model(**subject.call))
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    same = all(_same_bits(a, b) for a, b in zip(ours, theirs, strict=True))
    yield CheckLine(name, difference, 0.0, same, "" if same else "bits differ from the original's")


def _reference_line(subject: _Subject, name: str) -> Iterator[CheckLine]:
    assert subject.applied.graph is not None
    recorder = Recorder(subject.applied.graph, (match, merge, ATTENTION))
    recorder.run(*read_state(subject.model, subject.applied.capture), *subject.leaves)
    yield _matches(recorder, name)
    yield _merges(recorder)
    if (line := _attentions(recorder)) is not None:
        yield line


def _matches(recorder: Recorder, name: str) -> CheckLine:
    images = wrong = ties = 0
    for (keys, r, protected), assign in recorder.calls(match):
        plain = reference.match(keys, r, tuple(protected))
        margin = reference.match_margin(keys, r, tuple(protected))
        for mine, theirs, gap in zip(assign, plain, margin, strict=True):
            images += 1
            if not torch.equal(mine, theirs):
                tied = float(gap) <= _TIE
                ties += tied
                wrong += not tied
    note = f"{images} matches, {ties} of them ties within rounding" if ties else f"{images} matches"
    return CheckLine(name, float(wrong), 0.0, wrong == 0, note)


def _merges(recorder: Recorder) -> CheckLine:
    worst, tolerance, count = 0.0, 0.0, 0
    for (x, size, assign, tokens), merged in recorder.calls(merge):
        count += 1
        size = x.new_ones(x.shape[:2], dtype=torch.float32) if size is None else size
        plain, _ = reference.merge(x.double(), size.double(), assign, tokens)
        worst = max(worst, relative_error(merged, plain))
        tolerance = _tolerance(x.dtype)
    return CheckLine("   merges against the reference", worst, tolerance, worst <= tolerance, f"{count} merges")


def _attentions(recorder: Recorder) -> CheckLine | None:
    worst, tolerance, count = 0.0, 0.0, 0
    for (query, key, value, *rest), out, kwargs in recorder.calls_with_kwargs(ATTENTION):
        bias = rest[0] if rest else kwargs.get("attn_mask")
        if bias is None:
            continue
        count += 1
        size = bias.double().exp()[:, 0, 0, :]
        plain = reference.proportional_attention(
            query.double(), key.double(), value.double(), size, kwargs.get("scale")
        )
        worst = max(worst, relative_error(out, plain))
        tolerance = _tolerance(query.dtype)
    if not count:
        return None
    return CheckLine(
        "   proportional attention against the reference",
        worst,
        tolerance,
        worst <= tolerance,
        f"{count} attentions",
    )


def _compiled_line(subject: _Subject, name: str) -> Iterator[CheckLine]:
    eager = tensors(subject.merged(**subject.call))
    compiled = subject.run_compiled(subject.call)
    error = _worst(compiled, eager)
    if not subject.low_precision:
        yield CheckLine(name, error, FLOAT32_TOLERANCE, error <= FLOAT32_TOLERANCE)
        return
    yield CheckLine(name, error, float("inf"), None, "merges flip on ties: see the next line")
    yield _replay_line(subject)


def _replay_line(subject: _Subject) -> CheckLine:
    """One run's assignments in the eager, the compiled and a float64 graph."""
    model, applied = subject.model, subject.applied
    assert applied.graph is not None
    values = [*read_state(model, applied.capture), *subject.leaves]
    recorder = Recorder(applied.graph, (match,))
    recorder.run(*values)
    assigns = [assign for _, assign in recorder.calls(match)]
    graph = replayed(applied.graph)
    eager = tensors(graph(*values, *assigns))
    compiled = tensors(subject.compile(graph)(*values, *assigns))
    exact_model = copy.deepcopy(model).double()
    exact_call = pytree.tree_map(_double, subject.call)
    exact = make_applied(exact_model, subject.merged.method, exact_call, outputs=subject.merged.outputs)
    assert exact.graph is not None
    exact_values = [*read_state(exact_model, exact.capture), *pytree.tree_leaves(exact_call)]
    truth = tensors(replayed(exact.graph)(*exact_values, *assigns))
    eager_error, compiled_error = _worst(eager, truth), _worst(compiled, truth)
    ratio = compiled_error / max(eager_error, 1e-12)
    return CheckLine(
        "   replayed: distance from float64, compiled over eager",
        ratio,
        LOW_PRECISION_RATIO,
        ratio <= LOW_PRECISION_RATIO,
        f"{compiled_error:.1e} over {eager_error:.1e}",
    )


def _duplicates_line(subject: _Subject, name: str) -> Iterator[CheckLine]:
    model, applied, call = subject.model, subject.applied, subject.call
    if subject.low_precision:
        model = copy.deepcopy(model).float()
        call = pytree.tree_map(_single, call)
        applied = make_applied(model, subject.merged.method, call)
    found = check_duplicates(model, applied.capture, subject.merged.method, call)
    if found.blind is not None:
        yield CheckLine(name, found.error, FLOAT32_TOLERANCE, None, f"blind here: {found.blind}")
        return
    passed = found.error <= FLOAT32_TOLERANCE
    note = f"r={found.r}; without proportional attention {found.control:.1e}"
    yield CheckLine(name, found.error, FLOAT32_TOLERANCE, passed, note)


def _determinism_line(subject: _Subject, name: str) -> Iterator[CheckLine]:
    call = _at_least_two(subject.call)
    first, second = subject.run_compiled(call), subject.run_compiled(call)
    yield _bits(name, first, second)
    neighbours = subject.run_compiled(pytree.tree_map(_other_neighbours, call))
    batch = pytree.tree_leaves(call)[0].shape[0]
    pairs = [
        (a[:1], b[:1])
        for a, b in zip(first, neighbours, strict=True)
        if a.ndim and a.shape[0] == batch
    ]
    yield _bits("   whatever its neighbours", *map(list, zip(*pairs, strict=True)))


def _bits(name: str, first: Sequence[Tensor], second: Sequence[Tensor]) -> CheckLine:
    same = all(_same_bits(a, b) for a, b in zip(first, second, strict=True))
    difference = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
    return CheckLine(name, difference, 0.0, same)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # NaN equals itself here: bits are compared, not numbers.
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(a.isnan(), b.isnan())


def _worst(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))


def _tolerance(dtype: torch.dtype) -> float:
    return _MERGE_TOLERANCE.get(dtype, _BFLOAT16_TOLERANCE)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _at_least_two(call: dict[str, Any]) -> dict[str, Any]:
    batch = next(v.shape[0] for v in pytree.tree_leaves(call) if isinstance(v, Tensor))
    if batch > 1:
        return call
    return dict(
        pytree.tree_map(
            lambda v: torch.cat([v, v]) if isinstance(v, Tensor) and v.ndim else v, call
        )
    )


def _other_neighbours(value: Any) -> Any:
    """The first image as it is, the others replaced."""
    if not isinstance(value, Tensor) or not value.ndim or not value.is_floating_point():
        return value
    return torch.cat([value[:1], -1.5 * value[1:].flip(0) + 0.25])


_LINES: dict[str, Callable[[_Subject, str], Iterator[CheckLine]]] = {
    "1. r=0 is the original, bit for bit": _identity_line,
    "2. matches against the reference": _reference_line,
    "3. compiled against merged eager": _compiled_line,
    "4. lossless on duplicate tokens": _duplicates_line,
    "5. the same bits again": _determinism_line,
}

