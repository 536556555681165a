"""The harness behind ``check``: may this compiled model be trusted?

Five lines, each with its figure, its tolerance and its verdict. The oracle for matches and
merges is :mod:`tomepass.reference`, which shares no code with the pass.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from tomepass import reference
from tomepass.attention import FUSED, PRODUCTS
from tomepass.backend import Inner, resolve_inner
from tomepass.capture import describe_inputs
from tomepass.config import RLike, ToMe, resolve_method
from tomepass.duplicates import check_duplicates
from tomepass.errors import TomeError
from tomepass.graphs import Call, Recorder, relative_error, replayed
from tomepass.module import Applied, MergedModel, apply, make_applied, read_state
from tomepass.ops.match import match
from tomepass.ops.merge import merge
from tomepass.ops.padding import PADDED
from tomepass.ops.side import keep, merge_bias, merge_rows, rows
from tomepass.planning import plan_graph
from tomepass.report import BlockReport
from tomepass.rewrite import rewrite

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

FLOAT32_TOLERANCE = 1e-4
# How much further from float64 than eager the compiled graph may be, in low precision.
LOW_PRECISION_RATIO = 2.0
# A merge may differ from the reference by the rounding of its weights and its result.
_MERGE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3}
_BFLOAT16_TOLERANCE = 3e-2
# Cosines of the same keys closer than this are ties that rounding may break either way,
_TIE = 1e-6
# and of keys that went through some blocks of rounding.
_DEEP_TIE = 1e-5


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
    lines: list[CheckLine] = []
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
        return next(int(v.shape[0]) for v in self.leaves if isinstance(v, Tensor) and v.ndim)

    @property
    def low_precision(self) -> bool:
        held = [v for v in self.values if isinstance(v, Tensor) and v.is_floating_point()]
        return any(v.dtype in (torch.bfloat16, torch.float16) for v in held)

    @cached_property
    def recorded(self) -> Recorder:
        """One eager run: every match, merge and attention with its inputs."""
        assert self.applied.rewritten is not None
        renamed = self.applied.rewritten.renamed
        names = set()
        for block in self.applied.report.blocks:
            weights = renamed[block.weights]
            names |= {weights, *_scores_names(self.graph, weights)}
        recorder = Recorder(self.graph, _CHECKED, names)
        recorder.run(*self.values)
        return recorder

    def call_named(self, name: str) -> Call:
        """The recorded call of a node."""
        return next(call for call in self.recorded.calls if call.node.name == name)

    def keys_of(self, step: _Step) -> list[Tensor]:
        """What may be the keys of an attention: of a product written out, either factor."""
        node = step.attention.node
        if node.target is FUSED:
            return [step.attention.args[1]]
        while node.target not in PRODUCTS:
            node = node.args[0]  # type: ignore[assignment]
        factors = pytree.tree_leaves(self.call_named(node.name).args)
        return [factor for factor in factors if isinstance(factor, Tensor)]

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
        return tensors(self.compiled(**call))


def tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among a model's outputs."""
    return [
        v for v in pytree.tree_leaves(outputs) if isinstance(v, Tensor) and v.is_floating_point()
    ]


# ---- 1. r=0 is the original -------------------------------------------------------------------


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
    plain = subject.merged.method.replace(r=0, trace_source=False)
    rewritten = rewrite(captured, plan_graph(captured, plain)).module
    ours = tensors(rewritten(*subject.values))
    with _fast_path_off():
        theirs = tensors(subject.model(**subject.call))
    yield _bits(name, ours, theirs, "bits differ from the original's")


# ---- 2. every match and merge against the reference -------------------------------------------


def _reference_line(subject: _Subject, name: str) -> Iterator[CheckLine]:
    chains = _chains(subject)
    yield _matches(subject, chains, name)
    yield _merges(subject, chains)
    yield from _attentions(subject, chains)
    yield from _beside(subject, chains)


@dataclass(frozen=True)
class _Step:
    """One block as the reference sees it, sizes and protected positions its own."""

    block: BlockReport
    protected: tuple[int, ...]
    size: Tensor | None
    attention: Call
    matched: Call | None
    source: Tensor | None = None


def _chains(subject: _Subject) -> list[_Step]:
    """The blocks of all streams, with the reference's own books of sizes and positions."""
    rewritten, report = subject.applied.rewritten, subject.applied.report
    assert rewritten is not None
    calls = {call.node.name: call for call in subject.recorded.calls}
    steps = []
    for stream, matches in zip(report.streams, rewritten.matches, strict=True):
        size, source, held = None, None, stream.protected
        for block, name in zip(stream.blocks, matches, strict=True):
            matched = None if name is None else calls[name]
            attention = calls[rewritten.renamed[block.weights]]
            steps.append(_Step(block, held, size, attention, matched, source))
            if matched is None:
                continue
            assign: Tensor = matched.result
            if size is None and len(matched.args) > 3:
                size = matched.args[3]
            before = torch.ones(assign.shape, device=assign.device) if size is None else size
            _, size = reference.merge(before[..., None], before, assign, block.tokens_out)
            source = assign if source is None else reference.compose(assign, source)
            held = tuple(range(len(held)))
    return steps


def _matches(subject: _Subject, steps: list[_Step], name: str) -> CheckLine:
    images = wrong = ties = 0
    for step in steps:
        if step.matched is None:
            continue
        keys, r, protected, *size = step.matched.args
        padding = size[0] < PADDED if size else None
        # What the operator was asked, what it answered, and how it breaks exact ties.
        asked = (r, tuple(protected)) == (step.block.r, step.protected)
        asked &= any(_same_keys(keys, seen) for seen in subject.keys_of(step))
        probe = _tied_keys(keys)
        tied = match(probe, step.block.r, list(step.protected))
        fair = torch.equal(tied, reference.match(probe, step.block.r, step.protected))
        wrong += not (asked and fair)
        plain = reference.match(keys, step.block.r, step.protected, padding=padding)
        for image, (mine, theirs) in enumerate(zip(step.matched.result, plain, strict=True)):
            images += 1
            if not torch.equal(mine, theirs):
                one = keys[image : image + 1]
                margin = reference.match_margin(one, step.block.r, step.protected)
                ties += (tie := float(margin) <= _TIE)
                wrong += not tie
    note = f"{images} matches, and exact ties"
    if ties:
        note += f"; {ties} differ, all ties within rounding"
    return CheckLine(name, float(wrong), 0.0, wrong == 0, note)


def _tied_keys(keys: Tensor) -> Tensor:
    """One image of keys of the same shape along four axes alone: cosines are exactly 0 or 1."""
    _, heads, tokens, width = keys.shape
    pattern = torch.arange(tokens, device=keys.device) * 7 // 3 % min(4, width)
    axes = torch.eye(width, device=keys.device)[pattern]
    return axes.expand(1, heads, -1, -1)


def _merges(subject: _Subject, steps: list[_Step]) -> CheckLine:
    worst, tolerance = 0.0, 0.0
    merges = subject.recorded.calls_of(merge)
    by_assign = {id(s.matched.result): s for s in steps if s.matched is not None}
    for call in merges:
        x, _, assign, tokens = call.args
        step = by_assign.get(id(assign))
        size = None if step is None else step.size
        before = torch.ones(x.shape[:2], device=x.device) if size is None else size
        plain, _ = reference.merge(x.double(), before, assign, tokens)
        fits = step is not None and tokens == step.block.tokens_out
        worst = max(worst, relative_error(call.result, plain) if fits else float("inf"))
        tolerance = max(tolerance, _tolerance(x.dtype))
    passed = worst <= tolerance
    name = "   merges against the reference"
    return CheckLine(name, worst, tolerance, passed, f"{len(merges)} merges")


def _attentions(subject: _Subject, steps: list[_Step]) -> Iterator[CheckLine]:
    worst, tolerance, count = 0.0, 0.0, 0
    proportional = subject.merged.method.prop_attn
    for step in steps:
        if step.size is None:
            continue
        count += 1
        size = step.size if proportional else _padding_alone(step.size)
        one = _fused if step.attention.node.target is FUSED else _written_out
        result: Tensor = step.attention.result
        worst = max(worst, relative_error(result, one(subject, step.attention, size)))
        tolerance = max(tolerance, _tolerance(result.dtype))
    if count:
        name = "   attentions against the reference"
        note = f"{count} {'proportional' if proportional else 'plain'} attentions"
        yield CheckLine(name, worst, tolerance, worst <= tolerance, note)


def _fused(subject: _Subject, call: Call, size: Tensor | None) -> Tensor:
    query, key, value = call.args[:3]
    if call.kwargs.get("enable_gqa"):
        shared = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
    mask = call.node.args[3] if len(call.node.args) > 3 else None
    made = [n for n in _near(mask) if n.target is merge_bias]
    bias = subject.call_named(made[0].name).result if made else None
    return reference.proportional_attention(
        query.double(), key.double(), value.double(), size, call.kwargs.get("scale"), bias
    )


def _written_out(subject: _Subject, call: Call, size: Tensor | None) -> Tensor:
    scores: Tensor = call.args[0]
    if size is not None:
        (added,) = call.node.all_input_nodes
        scores = subject.call_named(added.name).args[0]
    return reference.proportional_weights(scores.double(), size)


def _padding_alone(size: Tensor) -> Tensor | None:
    """What sizes do without proportional attention: they leave the padding out."""
    hidden = size < PADDED
    return torch.where(hidden, size, 1.0) if bool(hidden.any()) else None


def _near(node: Any) -> list[fx.Node]:
    return [node, *node.all_input_nodes] if isinstance(node, fx.Node) else []


def _scores_names(graph: fx.GraphModule, weights: str) -> set[str]:
    """What a softmax reads, and the product its scores come from."""
    node = next(n for n in graph.graph.nodes if n.name == weights)
    if node.target is FUSED:
        return set()
    names = set()
    while node.target not in PRODUCTS:
        node = node.args[0]
        names.add(node.name)
    return names


def _same_keys(keys: Tensor, seen: Tensor) -> bool:
    """Are the keys a match was given those that an attention multiplies, in another view?"""
    if keys.numel() != seen.numel():
        return False
    images = keys.shape[0]
    heads = seen if seen.shape[0] == images else seen.reshape(images, -1, *seen.shape[1:])
    heads = heads if heads.ndim == keys.ndim else heads.unsqueeze(1)
    orders = itertools.permutations(range(1, heads.ndim))
    views = (heads.permute(0, *order) for order in orders)
    return any(view.shape == keys.shape and torch.equal(view, keys) for view in views)


def _beside(subject: _Subject, steps: list[_Step]) -> Iterator[CheckLine]:
    """Tables and biases carried along with the tokens."""
    worst, tolerance, count = 0.0, 0.0, 0
    sources = [step.source for step in steps if step.source is not None]
    last = {id(step.matched.result): step for step in steps if step.matched is not None}
    for call in subject.recorded.calls:
        if call.node.target not in _BESIDE:
            continue
        count += 1
        plain = _BESIDE[call.node.target](call, sources, last)
        if plain is None or plain.shape != call.result.shape:
            worst = float("inf")
            continue
        worst = max(worst, relative_error(call.result, plain))
        tolerance = max(tolerance, _tolerance(call.result.dtype))
    if count:
        name = "   side tensors against the reference"
        yield CheckLine(name, worst, tolerance, worst <= tolerance, f"{count} tables and biases")


def _plain_keep(call: Call, sources: list[Tensor], last: dict[int, _Step]) -> Tensor | None:
    before, assign, tokens, protected = call.args
    step = last.get(id(assign))
    if step is None or tuple(protected) != step.protected:
        return None
    chosen = reference.kept(assign, step.protected, tokens)
    return (
        chosen
        if before is None
        else torch.stack([b[c] for b, c in zip(before, chosen, strict=True)])
    )


def _plain_rows(call: Call, sources: list[Tensor], last: dict[int, _Step]) -> Tensor | None:
    table, kept, dim, ndim, removed = call.args
    wide = table.reshape([1] * (ndim - table.ndim) + list(table.shape))
    images = []
    for image, places in enumerate(kept.tolist()):
        rows = [place - sum(gone < place for gone in removed) for place in places]
        images.append(
            wide[image if wide.shape[0] > 1 else 0].index_select(
                dim - 1, torch.tensor(rows, device=table.device)
            )
        )
    return torch.stack(images)


def _plain_merge_rows(call: Call, sources: list[Tensor], last: dict[int, _Step]) -> Tensor | None:
    table, source, tokens = call.args
    return reference.merged_rows(table.double(), source, tokens)


def _plain_merge_bias(call: Call, sources: list[Tensor], last: dict[int, _Step]) -> Tensor | None:
    bias, source, tokens = call.args
    if not any(torch.equal(source, own) for own in sources):
        return None
    wide = bias.double().reshape([1] * (4 - bias.ndim) + list(bias.shape))
    return reference.merged_bias(wide, source, tokens)


_BESIDE: dict[Any, Callable[[Call, list[Tensor], dict[int, _Step]], Tensor | None]] = {
    keep: _plain_keep,
    rows: _plain_rows,
    merge_rows: _plain_merge_rows,
    merge_bias: _plain_merge_bias,
}
_CHECKED = (match, merge, FUSED, *_BESIDE)


# ---- 3. compiled against eager -----------------------------------------------------------------


def _compiled_line(subject: _Subject, name: str) -> Iterator[CheckLine]:
    eager = tensors(subject.merged(**subject.call))
    compiled = subject.run_compiled(subject.call)
    error = _worst(compiled, eager)
    if subject.low_precision:
        yield CheckLine(name, error, float("inf"), None, "merges flip on ties: see the next line")
        yield _low_precision_line(subject)
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


def _tied_images(subject: _Subject) -> set[int]:
    """Images in which a rounding could make other tokens merge."""
    tied: set[int] = set()
    for call in subject.recorded.calls_of(match):
        keys, r, protected, *_ = call.args
        margin = reference.match_margin(keys, r, tuple(protected))
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
    model = copy.deepcopy(subject.model).double()
    call = pytree.tree_map(_double, subject.call)
    merged = subject.merged
    exact = make_applied(model, merged.method, call, outputs=merged.outputs)
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
    assigns = [call.result for call in subject.recorded.calls_of(match)]
    graph = replayed(subject.graph)
    eager = tensors(graph(*subject.values, *assigns))
    return eager, tensors(subject.compile(graph)(*subject.values, *assigns)), assigns


# ---- 4. lossless on duplicates -----------------------------------------------------------------


def _duplicates_line(subject: _Subject, name: str) -> Iterator[CheckLine]:
    model, applied, call = subject.model, subject.applied, subject.call
    if subject.low_precision:
        model = copy.deepcopy(model).float()
        call = pytree.tree_map(_single, call)
        applied = make_applied(model, subject.merged.method, call)
    found = check_duplicates(model, applied.capture, subject.merged.method, call)
    passed: bool | None = found.error <= FLOAT32_TOLERANCE
    note = f"{found.schedule!r}; without proportional attention {found.control:.1e}"
    if found.blind is not None:
        passed, note = (None if passed else False), f"blind here: {found.blind}"
    yield CheckLine(name, found.error, FLOAT32_TOLERANCE, passed, note)


# ---- 5. deterministic --------------------------------------------------------------------------


def _determinism_line(subject: _Subject, name: str) -> Iterator[CheckLine]:
    call = _at_least_two(subject.call, subject.images)
    first, second = subject.run_compiled(call), subject.run_compiled(call)
    again = _bits(name, first, second, "a second run gives other bits")
    yield again
    name = "   whatever an image's neighbours"
    if not again.passed:
        yield CheckLine(name, 0.0, 0.0, None, "blind here: not even the same batch repeats")
        return
    changed = subject.run_compiled(pytree.tree_map(_other_neighbours, call))
    images = max(2, subject.images)
    alone = _own_rows(subject, call, images)
    rows = [(a[:1], b[:1]) for a, b, own in zip(first, changed, alone, strict=True) if own]
    ours, theirs = [a for a, _ in rows], [b for _, b in rows]
    yield _bits(name, ours, theirs, "the first image changes with the others")


def _own_rows(subject: _Subject, call: dict[str, Any], images: int) -> list[bool]:
    """Which outputs hold, for each image, what the unmerged model reads off that image alone.

    A similarity of images and texts does not.
    """
    first = tensors(subject.model(**call))
    changed = tensors(subject.model(**pytree.tree_map(_other_neighbours, call)))
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


def _tolerance(dtype: torch.dtype) -> float:
    return _MERGE_TOLERANCE.get(dtype, _BFLOAT16_TOLERANCE)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _at_least_two(call: dict[str, Any], images: int) -> dict[str, Any]:
    def doubled(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.ndim and value.shape[0] == images
        return torch.cat([value, value]) if batched else value

    return call if images > 1 else dict(pytree.tree_map(doubled, call))


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
