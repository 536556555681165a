"""Stage 4: plain integers, one entry a block, made and checked before the graph is touched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tomepass.counts.blocks import plan_counts
from tomepass.graphs.canonical import CanonicalGraph
from tomepass.graphs.nodes import Size, is_known, same, shape_of, target_name
from tomepass.methods import Method
from tomepass.planning.costs import ModelCosts
from tomepass.planning.macs import batch_sizes
from tomepass.planning.solving import even
from tomepass.planning.streams import Planned, PlannedStream, plan_of
from tomepass.reading.attention import find_attentions
from tomepass.reading.axis import Axis
from tomepass.reading.layouts import Attended, Layout, Masked, Positional
from tomepass.reading.masks import comes_from_a_mask
from tomepass.reading.mismatch import Mismatch
from tomepass.reading.origins import input_dependent, trace_origins
from tomepass.reading.structure import Ancestry, Block, Stream, Structure, find_structure
from tomepass.reading.tokens import TokenFlow, attends, follow_tokens
from tomepass.reading.writes import hidden_write

aten = torch.ops.aten

_TEXT = (
    "its tokens are looked up by ids, a text tower beside another one: left alone, the other is "
    "merged"
)


_TEXT_ADVICE = "apply tomepass to the text model by itself to merge it too"


def plan_graph(captured: CanonicalGraph, method: Method) -> Planned:
    """Reads a graph and plans its streams; what cannot be planned is a mismatch.

    Raises:
        CountsRefused: if the method lists more counts than a stream has blocks.
        Refused: if it names a share of the multiply-accumulates that cannot be reached.
        NotTrained: if it scores tokens by a policy and has none.
    """
    method.ready()
    if (write := hidden_write(captured.graph, captured.data)) is not None:
        reason = (
            f"{target_name(write)} writes in place into a tensor that is also read elsewhere, so "
            "what its readers depend on cannot be followed"
        )
        advice = "make a new tensor instead, for example with torch.cat or torch.where"
        before = [a for a in find_attentions(captured.graph)[0] if a.result < write]
        block = len(before) - 1 if before else None
        return Planned(method, (), (Mismatch.at(write, reason, block=block, advice=advice),))
    structure = find_structure(captured)
    planned: list[PlannedStream] = []
    mismatches: list[Mismatch] = []
    waiting = list(structure.streams)
    while waiting:
        stream = waiting.pop(0)
        if (shared := _shared(stream, planned)) is not None:
            mismatches.append(shared)
            continue
        place = len(planned), len(planned) + 1 + len(waiting)
        found = _plan_stream(captured, stream, structure, method, place)
        if isinstance(found, Stream):
            # Its tokens are made anew on the way: two streams, one after the other.
            rest = stream.blocks[len(found.blocks) :]
            waiting[:0] = [found, Stream(tuple(replace(b, index=i) for i, b in enumerate(rest)))]
        elif isinstance(found, Mismatch):
            mismatches.append(found)
        else:
            planned.append(found)
    for text in _texts_beside(captured, planned, structure.ancestry):
        planned.remove(text)
        mismatches.append(Mismatch.at(text.stream.entry, _TEXT, advice=_TEXT_ADVICE))
    if method.schedule.macs is not None:
        planned = _to_target(captured, planned, method)
    for attention, mismatch in structure.others.items():
        # What an attention outside a stream reads of it, the token analysis deals with.
        read = any(structure.ancestry.depends(attention, p.stream.entry) for p in planned)
        if mismatch not in mismatches and not read:
            mismatches.append(mismatch)
    if not planned and not mismatches:
        mismatches.append(Mismatch("the graph holds no attention, so there are no tokens to merge"))
    return Planned(method, tuple(planned), tuple(mismatches))


def _texts_beside(
    captured: CanonicalGraph, planned: list[PlannedStream], ancestry: Ancestry
) -> list[PlannedStream]:
    """Streams whose tokens are looked up by the user's ids, beside others that are not."""
    dependent = input_dependent(captured.graph, captured.data)
    lookups = [
        node
        for node in captured.graph.find_nodes(op="call_function", target=aten.embedding.default)
        if node.args[1] in dependent
    ]
    texts = [p for p in planned if any(ancestry.depends(p.stream.entry, n) for n in lookups)]
    return texts if len(texts) < len(planned) else []


def _shared(stream: Stream, planned: list[PlannedStream]) -> Mismatch | None:
    if not any(stream.entry in p.flow.layouts for p in planned):
        return None
    return Mismatch.at(
        stream.entry,
        "these blocks read tokens of another stream, which is merged: nothing more is "
        "merged in them",
    )


def _plan_stream(
    captured: CanonicalGraph,
    stream: Stream,
    structure: Structure,
    method: Method,
    place: tuple[int, int],
) -> PlannedStream | Stream | Mismatch:
    """The plan, or the blocks at its start that are a stream of their own, or why not.

    Args:
        place: the number of the stream, and how many there are.
    """
    ancestry = structure.ancestry
    last = stream.blocks[-1].merge_at
    for attention, mismatch in structure.others.items():
        if ancestry.depends(last, attention) and ancestry.depends(attention, stream.entry):
            return mismatch
    read = _token_layout(captured, stream, ancestry, method)
    if isinstance(read, Mismatch):
        return read
    layout, protected = read
    flow = follow_tokens(captured, stream.entry, layout, protected)
    for block in stream.blocks[1:]:
        if block.entry not in flow.layouts:
            return Stream(stream.blocks[: block.index])
    for block in stream.blocks:
        if (found := _check_block(block, layout, flow, ancestry)) is not None:
            return found
    padding = _padding(stream, flow)
    if isinstance(padding, Mismatch):
        return padding
    solved_later = method.schedule.macs is not None
    blocks = len(stream.blocks)
    tokens = len(layout.positions)
    if solved_later:
        plan = plan_counts(tokens, protected, (0,) * blocks)
    else:
        plan = plan_of(method, stream, tokens, protected, *place)
    planned = PlannedStream(stream, layout, flow, ancestry.of(last), plan, padding)
    return _masked_tokens(planned) or planned


def _token_layout(
    captured: CanonicalGraph, stream: Stream, ancestry: Ancestry, method: Method
) -> tuple[Layout, tuple[int, ...]] | Mismatch:
    """The layout of the stream's entry under which its first attention sees whole sequences.

    With it come the protected positions, which it takes to see through splits and cats.
    """
    block = stream.blocks[0]
    shape = shape_of(block.entry)
    reason = open_size = None
    for dim in sorted(range(len(shape)), key=lambda d: (d in (0, len(shape) - 1), d)):
        if _is_batch(shape[dim], captured):  # counting it would fix it
            continue
        if not is_known(shape[dim]):
            open_size = open_size or _uncounted(block.entry, dim)
            continue
        tokens = _count(shape[dim])
        protected = _protected(captured, stream, dim, tokens, method)
        known = protected if isinstance(protected, tuple) else ()
        for batch in (b for b in range(len(shape)) if b != dim):
            layout = Layout(Axis(dim), Axis(batch), tuple(range(tokens)))
            flow = follow_tokens(captured, block.entry, layout, known, block.attention.result)
            if isinstance(attends(block.attention, flow), (Layout, Masked)):
                return protected if isinstance(protected, Mismatch) else (layout, protected)
            reason = reason or _obstacle(flow, block, ancestry)
    return (
        open_size
        or reason
        or Mismatch.at(
            block.attention.result,
            f"attention does not see the residual stream {list(shape)} as one sequence of tokens",
            block=0,
        )
    )


def _uncounted(entry: fx.Node, dim: int) -> Mismatch:
    return Mismatch.at(
        entry,
        f"the size of dimension {dim} of the residual stream {list(shape_of(entry))} is only "
        "known when the model runs, and tokens are counted before",
        block=0,
        advice="give every image the same number of tokens, and hide those not in use with a "
        "boolean padding mask",
    )


def _obstacle(flow: TokenFlow, block: Block, ancestry: Ancestry) -> Mismatch | None:
    """What keeps a block's attention from seeing all tokens, the first such thing."""
    result = block.attention.result
    between = ancestry.of(result) - ancestry.of(block.entry) | {result}
    for node, outcome in flow.outcomes.items():
        if node in between and isinstance(outcome, Positional):
            return Mismatch.at(
                node,
                "expected attention over all tokens of the residual stream (a windowed or "
                f"hierarchical model has none): {outcome.reason}",
                block=block.index,
            )
    return None


def _is_batch(size: Size, captured: CanonicalGraph) -> bool:
    """Is it the symbol that stands for the number of images?"""
    images = batch_sizes(captured)
    return not isinstance(size, int) and any(same(size, count) for count in images)


def _count(size: Any) -> int:
    # int() of a symbolic size specialises on it: another resolution is another graph.
    return int(size)


def _protected(
    captured: CanonicalGraph, stream: Stream, dim: int, tokens: int, method: Method
) -> tuple[int, ...] | Mismatch:
    if method.protected is not None:
        if outside := [p for p in method.protected if p >= tokens]:
            return Mismatch.at(
                stream.entry,
                f"protected positions {outside} lie outside the {tokens} tokens",
                advice="positions count from 0 in the sequence the first block sees",
            )
        return method.protected
    origins = trace_origins(stream.entry, dim, captured.data)
    if origins.given and captured.fragment:
        return Mismatch.at(
            stream.entry,
            "this graph starts inside the model, after a graph break or at a submodule: its "
            "tokens come in from outside, so which of them are protected cannot be seen",
            block=0,
            advice="remove the graph break, or give the positions: ToMe(..., protected=(0,)) "
            "for a class token, protected=() for none",
        )
    if origins.lost_at is not None:
        return Mismatch.at(
            origins.lost_at,
            "the model puts tokens of its own among the input's before this operator, which may "
            "move them: which tokens are protected cannot be seen",
            advice="give their positions in the sequence the first block sees, for example "
            "ToMe(..., protected=(0,))",
        )
    return origins.protected


def _padding(stream: Stream, flow: TokenFlow) -> fx.Node | Mismatch | None:
    """The one padding mask of all blocks."""
    masks = []
    for block in stream.blocks:
        outcome = flow.outcomes.get(block.attention.result)
        masks.append(outcome.padding if isinstance(outcome, Attended) else None)
        if masks[-1] is not masks[0]:
            return Mismatch.at(
                block.attention.result,
                "expected one padding mask for all attentions of a stream; this one has another",
                block=block.index,
            )
    return masks[0]


def _masked_tokens(planned: PlannedStream) -> Mismatch | None:
    """A mask that multiplies tokens between merges."""
    for side in planned.sides:
        if side.how == "kept" and comes_from_a_mask(side.node):
            return Mismatch.at(
                side.node,
                f"{side.node.name} is a mask that multiplies tokens: those that it hides would "
                "merge with others",
                advice="hide tokens from attention with a boolean padding mask instead",
            )
    return None


def _check_block(
    block: Block, layout: Layout, flow: TokenFlow, ancestry: Ancestry
) -> Mismatch | None:
    result, stream = block.attention.result, block.merge_at
    seen = attends(block.attention, flow)
    if isinstance(seen, Masked):
        return Mismatch.at(result, seen.reason, block=block.index, advice=seen.advice)
    if not isinstance(seen, Layout) or seen.positions != layout.positions:
        return _obstacle(flow, block, ancestry) or Mismatch.at(
            result, "this attention sees only some of the tokens", block=block.index
        )
    if block.attention.key not in flow.layouts:
        return Mismatch.at(
            result,
            "expected keys made from the stream's tokens; the product nearest this attention's "
            "softmax takes none (heads mixed by a product are written so)",
            block=block.index,
        )
    merged = flow.layouts.get(stream)
    if merged != Layout(Axis(1), Axis(0), layout.positions) or len(shape_of(stream)) != 3:
        return Mismatch.at(
            stream,
            f"expected the residual stream as [B, N, C], got {list(shape_of(stream))}",
            block=block.index,
        )
    return None


def _to_target(
    captured: CanonicalGraph, planned: list[PlannedStream], method: Method
) -> list[PlannedStream]:
    """The streams with the smallest step of the method that reaches its share of the MACs."""
    share = method.schedule.macs
    assert share is not None
    if not planned:
        return planned
    costs = ModelCosts.read(captured, planned)
    return list(costs.planned(even(method, share, costs.share, costs.tokens, costs.depth)))
