"""One recorded run of a merged model, held against the plain reference.

The oracle is :mod:`tomepass.reference`, which shares no code with the pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from tomepass import reference
from tomepass.graphs.nodes import FUSED, PRODUCTS
from tomepass.handover.applied import Applied
from tomepass.ops.choices import CHOICES
from tomepass.ops.matching.match import match
from tomepass.ops.merging.combine import merge_max, mlerp
from tomepass.ops.merging.merge import merge
from tomepass.ops.merging.side import keep, merge_bias, merge_rows, rows
from tomepass.ops.merging.unmerge import unmerge
from tomepass.ops.padding import PADDED
from tomepass.proof.replay import Call, Recorder, relative_error
from tomepass.proof.report import BLIND, CheckLine
from tomepass.reporting.report import BlockReport

# A merge may differ from the reference by the rounding of its weights and its result.
_MERGE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3}


_BFLOAT16_TOLERANCE = 3e-2

# Cosines of the same keys closer than this are ties that rounding may break either way,
TIE = 1e-6


@dataclass(frozen=True)
class Recorded:
    """What every operator of the pass, and every attention, was given and answered in one run."""

    applied: Applied
    recorder: Recorder

    def calls_of(self, *targets: Any) -> list[Call]:
        """The calls of some operators, in order."""
        return self.recorder.calls_of(*targets)

    def call_named(self, name: str) -> Call:
        """The recorded call of a node."""
        return next(call for call in self.recorder.calls if call.node.name == name)

    def keys_of(self, step: _Step) -> list[Tensor]:
        """What may be the keys of an attention: of a product written out, either factor."""
        node = step.attention.node
        if node.target is FUSED:
            return [step.attention.args[1][:, :, : step.block.tokens_in]]
        while node.target not in PRODUCTS:
            node = node.args[0]  # type: ignore[assignment]
        factors = pytree.tree_leaves(self.call_named(node.name).args)
        return [factor for factor in factors if isinstance(factor, Tensor)]


def record(applied: Applied, values: list[Any]) -> Recorded:
    """Runs the merged graph eagerly, once."""
    graph = applied.graph
    assert graph is not None
    assert applied.rewritten is not None
    names = set()
    for block in applied.report.blocks:
        weights = applied.rewritten.renamed[block.weights]
        names |= {weights, *_scores_names(graph, weights)}
    recorder = Recorder(graph, _CHECKED, names)
    recorder.run(*values)
    return Recorded(applied, recorder)


def reference_lines(run: Recorded, name: str) -> Iterator[CheckLine]:
    """Matches, merges, attentions and side tensors, each kind on a line of its own."""
    assert run.applied.rewritten is not None
    if not run.applied.rewritten.referenced:
        method = type(run.applied.report.method).__name__
        note = f"{BLIND}the reference knows bipartite matches and means, not {method}"
        yield CheckLine(name, 0.0, 0.0, None, note)
        return
    chains = _chains(run)
    yield _matches(run, chains, name)
    yield _merges(run, chains)
    yield from _attentions(run, chains)
    yield from _beside(run, chains)


@dataclass(frozen=True)
class _Step:
    """One block as the reference sees it, sizes and protected positions its own."""

    block: BlockReport
    protected: tuple[int, ...]
    size: Tensor | None
    attention: Call
    matched: Call | None
    source: Tensor | None = None


def _chains(run: Recorded) -> list[_Step]:
    """The blocks of all streams, with sizes and positions as the reference keeps them."""
    rewritten, report = run.applied.rewritten, run.applied.report
    assert rewritten is not None
    calls = {call.node.name: call for call in run.recorder.calls}
    steps = []
    for stream, matches in zip(report.streams, rewritten.matches, strict=True):
        size, source, held = None, None, stream.protected
        for block, name in zip(stream.blocks, matches, strict=True):
            matched = None if name is None else calls[name]
            attention = calls[rewritten.renamed[block.weights]]
            steps.append(_Step(block, held, size, attention, matched, source))
            if matched is None:
                continue
            assign = assign_of(matched)
            if size is None and len(matched.args) > 3:
                size = matched.args[3]  # there is padding
            before = torch.ones(assign.shape, device=assign.device) if size is None else size
            _, size = reference.merge(before[..., None], before, assign, block.tokens_out)
            source = assign if source is None else reference.compose(assign, source)
            held = tuple(range(len(held)))
    return steps


def _matches(run: Recorded, steps: list[_Step], name: str) -> CheckLine:
    images = wrong = ties = 0
    for step in steps:
        if step.matched is None:
            continue
        keys, r, protected, *rest = step.matched.args
        padding = rest[0] < PADDED if rest and rest[0] is not None else None
        edges = edges_of(step.matched)
        # What the operator was asked, what it answered, and how it breaks exact ties.
        asked = (r, tuple(protected)) == (step.block.r, step.protected)
        if step.matched.node.target == match:
            asked &= any(_same_keys(keys, seen) for seen in run.keys_of(step))
            probe = _tied_keys(keys)
            tied = match(probe, step.block.r, list(step.protected))
            asked &= torch.equal(tied, reference.match(probe, step.block.r, step.protected))
        wrong += not asked
        plain = reference.match(keys, step.block.r, step.protected, padding=padding, edges=edges)
        for image, (mine, theirs) in enumerate(zip(assign_of(step.matched), plain, strict=True)):
            images += 1
            if not torch.equal(mine, theirs):
                one = keys[image : image + 1]
                alone = edges_of(step.matched, image)
                mask = None if padding is None else padding.expand(len(keys), -1)[image : image + 1]
                margin = reference.match_margin(
                    one, step.block.r, step.protected, edges=alone, padding=mask
                )
                ties += (tie := float(margin) <= TIE)
                wrong += not tie
    note = f"{images} matches, and exact ties"
    if ties:
        note += f"; {ties} differ, all ties within rounding"
    return CheckLine(name, float(wrong), 0.0, wrong == 0, note)


def assign_of(matched: Call) -> Tensor:
    """Where a match sends each token."""
    result: Tensor = matched.result if matched.node.target is match else matched.result[0]
    return result


def edges_of(matched: Call, image: int | None = None) -> reference.Edges:
    """How a match ranks its edges, in the reference's terms; of one image, if one is given."""
    if matched.node.target is match:
        return reference.Edges()
    importance, exponent, similarity, partition, seed = matched.args[4:]
    if importance is not None and image is not None:
        importance = importance[image : image + 1]
    return reference.Edges(similarity, partition, seed, importance, exponent)


def _tied_keys(keys: Tensor) -> Tensor:
    """One image of keys of the same shape along four axes alone: cosines are exactly 0 or 1."""
    _, heads, tokens, width = keys.shape
    pattern = torch.arange(tokens, device=keys.device) * 7 // 3 % min(4, width)
    axes = torch.eye(width, device=keys.device)[pattern]
    return axes.expand(1, heads, -1, -1)


def _merges(run: Recorded, steps: list[_Step]) -> CheckLine:
    worst, tolerance, count = 0.0, 0.0, 0
    by_assign = {id(assign_of(s.matched)): s for s in steps if s.matched is not None}
    for call in run.calls_of(*_COMBINING):
        step, plain = _plain_combined(run, call, by_assign, steps)
        if plain is None:  # tokens unmerged, not merged
            continue
        count += 1
        fits = step is not None and call.result.shape[1] == step.block.tokens_out
        worst = max(worst, relative_error(call.result, plain) if fits else float("inf"))
        tolerance = max(tolerance, tolerance_of(call.result.dtype))
    passed = worst <= tolerance
    name = "   merges against the reference"
    return CheckLine(name, worst, tolerance, passed, f"{count} merges")


def _plain_combined(
    run: Recorded, call: Call, by_assign: dict[int, _Step], steps: list[_Step]
) -> tuple[_Step | None, Tensor | None]:
    """The step that some tokens are merged in, and what the reference makes of them."""
    x: Tensor = call.args[0]
    if call.node.target is unmerge:
        stands: Tensor = call.args[1]
        if stands.shape[1] >= x.shape[1]:
            return None, None
        for own_step in steps:
            if own_step.block.tokens_in == x.shape[1] and own_step.matched is not None:
                assign, edges = assign_of(own_step.matched), edges_of(own_step.matched)
                own = reference.kept(assign, own_step.protected, stands.shape[1], edges)
                if torch.equal(own, stands):
                    return own_step, reference.unmerge(x, own)
        return None, x
    assign = call.args[1] if call.node.target is merge_max else call.args[2]
    step, left = by_assign.get(id(assign)), call.result.shape[1]
    size = None if step is None else step.size
    before = torch.ones(x.shape[:2], device=x.device) if size is None else size
    if call.node.target is merge_max:
        return step, reference.combine(x.double(), before, assign, left, "max")
    if call.node.target is mlerp:
        return step, reference.combine(x.double(), before, assign, left, f"mlerp_{call.args[4]}")
    if getattr(run.applied.report.method, "combine", None) == "mean":
        return step, reference.combine(x.double(), before, assign, left, "mean")
    return step, reference.merge(x.double(), before, assign, left)[0]


def _attentions(run: Recorded, steps: list[_Step]) -> Iterator[CheckLine]:
    worst, tolerance, count = 0.0, 0.0, 0
    proportional = run.applied.report.method.prop_attn
    for step in steps:
        if step.size is None:
            continue
        count += 1
        size = step.size if proportional else _padding_alone(step.size)
        result: Tensor = step.attention.result
        if step.attention.node.target is FUSED:
            plain = _fused(run, step.attention, size, step.block.tokens_in)
        else:
            plain = _written_out(run, step.attention, size)
        worst = max(worst, relative_error(result, plain))
        tolerance = max(tolerance, tolerance_of(result.dtype))
    if count:
        name = "   attentions against the reference"
        note = f"{count} {'proportional' if proportional else 'plain'} attentions"
        yield CheckLine(name, worst, tolerance, worst <= tolerance, note)


def _fused(run: Recorded, call: Call, size: Tensor | None, tokens: int) -> Tensor:
    # Keys beyond the tokens there are only fill up a tile: the reference does without them.
    query, key, value = (t[:, :, :tokens] for t in call.args[:3])
    if call.kwargs.get("enable_gqa"):
        shared = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
    mask: Any = call.node.args[3] if len(call.node.args) > 3 else None
    if mask is not None and mask.target is torch.ops.aten.constant_pad_nd.default:
        mask = mask.args[0]
    made = [n for n in _near(mask) if n.target is merge_bias]
    bias = run.call_named(made[0].name).result if made else None
    return reference.proportional_attention(
        query.double(), key.double(), value.double(), size, call.kwargs.get("scale"), bias
    )


def _written_out(run: Recorded, call: Call, size: Tensor | None) -> Tensor:
    scores: Tensor = call.args[0]
    if size is not None:
        (added,) = call.node.all_input_nodes
        scores = run.call_named(added.name).args[0]
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


def _beside(run: Recorded, steps: list[_Step]) -> Iterator[CheckLine]:
    """Tables and biases carried along with the tokens."""
    worst, tolerance, count = 0.0, 0.0, 0
    sources = [step.source for step in steps if step.source is not None]
    last = {id(assign_of(step.matched)): step for step in steps if step.matched is not None}
    for call in run.recorder.calls:
        if call.node.target not in _BESIDE:
            continue
        count += 1
        plain = _BESIDE[call.node.target](call, sources, last)
        if plain is None or plain.shape != call.result.shape:
            worst = float("inf")
            continue
        worst = max(worst, relative_error(call.result, plain))
        tolerance = max(tolerance, tolerance_of(call.result.dtype))
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


_COMBINING = (merge, merge_max, mlerp, unmerge)

_CHECKED = (*CHOICES, *_COMBINING, FUSED, *_BESIDE)


def tolerance_of(dtype: torch.dtype) -> float:
    return _MERGE_TOLERANCE.get(dtype, _BFLOAT16_TOLERANCE)
