"""Stage 4: plain integers, one entry a block, made and checked before the graph is touched."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from tomepass.axis import Axis, argument, shape_of
from tomepass.capture import CanonicalGraph
from tomepass.config import ToMe
from tomepass.constants import hides_nothing
from tomepass.origins import trace_origins
from tomepass.schedule import capped
from tomepass.structure import Mismatch, Stream, find_structure
from tomepass.tokens import Attended, Layout, Positional, TokenFlow, follow_tokens


@dataclass(frozen=True)
class BlockPlan:
    """What one block does: ``tokens_out = tokens_in - r``."""

    index: int
    tokens_in: int
    r: int

    @property
    def tokens_out(self) -> int:
        """Tokens left after the block's merge."""
        return self.tokens_in - self.r


@dataclass(frozen=True)
class StreamPlan:
    """What one residual stream does.

    Args:
        tokens: tokens entering it.
        protected: positions that never merge.
        blocks: one entry a block.
    """

    tokens: int
    protected: tuple[int, ...]
    blocks: tuple[BlockPlan, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class PlannedStream:
    """A stream with its analysis and its plan: what the rewrite needs."""

    stream: Stream
    layout: Layout
    flow: TokenFlow
    plan: StreamPlan


@dataclass(frozen=True)
class Planned:
    """All that was read off a graph and decided for it."""

    method: ToMe
    streams: tuple[PlannedStream, ...]
    mismatches: tuple[Mismatch, ...]


def plan_graph(captured: CanonicalGraph, method: ToMe) -> Planned:
    """Reads a graph and plans its streams; what cannot be planned is a mismatch.

    Raises:
        ValueError: if the method lists more counts than a stream has blocks.
    """
    structure = find_structure(captured)
    planned, mismatches = [], list(structure.mismatches)
    for stream in structure.streams:
        found = _plan_stream(captured, stream, method)
        if isinstance(found, Mismatch):
            mismatches.append(found)
        else:
            planned.append(found)
    if planned:
        # An attention outside the streams only reads tokens: the token analysis deals with it.
        mismatches = [m for m in mismatches if m not in structure.mismatches]
    return Planned(method, tuple(planned), tuple(mismatches))


def _plan_stream(
    captured: CanonicalGraph, stream: Stream, method: ToMe
) -> PlannedStream | Mismatch:
    layout = _token_layout(captured.graph, stream)
    if isinstance(layout, Mismatch):
        return layout
    protected = _protected(captured, stream, layout, method)
    if isinstance(protected, Mismatch):
        return protected
    flow = follow_tokens(captured.graph, stream.entry, layout, protected)
    for block in stream.blocks:
        if (mismatch := _check_block(block, layout, flow)) is not None:
            return mismatch
    plan = _schedule(len(layout.positions), protected, method.counts(len(stream.blocks)))
    return PlannedStream(stream, layout, flow, plan)


def _token_layout(graph: fx.Graph, stream: Stream) -> Layout | Mismatch:
    """The layout of the stream's entry under which its first attention sees whole sequences."""
    entry, attention = stream.entry, stream.blocks[0].attention
    shape = shape_of(entry)
    reason = None
    for dim in sorted(range(len(shape)), key=lambda d: (d in (0, len(shape) - 1), d)):
        for batch in (b for b in range(len(shape)) if b != dim):
            layout = Layout(Axis(dim), Axis(batch), tuple(range(_count(shape[dim]))))
            flow = follow_tokens(graph, entry, layout, (), until=attention)
            if isinstance(flow.outcomes.get(attention), Attended):
                return layout
            reason = reason or _first_obstacle(flow)
    return reason or Mismatch.at(
        attention,
        f"attention does not see the residual stream {list(shape)} as one sequence of tokens",
        block=0,
    )


def _first_obstacle(flow: TokenFlow) -> Mismatch | None:
    for node, outcome in flow.outcomes.items():
        if isinstance(outcome, Positional):
            return Mismatch.at(
                node,
                "expected attention over all tokens of the residual stream (a windowed or "
                f"hierarchical model has none): {outcome.reason}",
                block=0,
            )
    return None


def _count(size: Any) -> int:
    # int() of a symbolic size specialises on it: another resolution is another graph.
    return int(size)


def _protected(
    captured: CanonicalGraph, stream: Stream, layout: Layout, method: ToMe
) -> tuple[int, ...] | Mismatch:
    if method.protected is not None:
        if outside := [p for p in method.protected if p >= len(layout.positions)]:
            return Mismatch.at(
                stream.entry,
                f"protected positions {outside} lie outside the {len(layout.positions)} tokens",
                advice="positions count from 0 in the sequence the first block sees",
            )
        return method.protected
    origins = trace_origins(stream.entry, layout.tokens.dim, captured.data)
    if origins.given and captured.fragment:
        return Mismatch.at(
            stream.entry,
            "this graph starts inside the model, after a graph break or at a submodule: its "
            "tokens come in from outside, so which of them are protected cannot be seen",
            block=0,
            advice="remove the graph break, or give the positions: ToMe(..., protected=(0,)) "
            "for a class token, protected=() for none",
        )
    return origins.protected


def _check_block(block: Any, layout: Layout, flow: TokenFlow) -> Mismatch | None:
    attention, index = block.attention, block.index
    outcome = flow.outcomes.get(attention)
    if not isinstance(outcome, Attended) or outcome.layout.positions != layout.positions:
        reason = getattr(outcome, "reason", "this attention does not see all tokens")
        return Mismatch.at(attention, reason, block=index)
    if argument(attention, 5, "is_causal", False):
        return Mismatch.at(
            attention,
            "causal attention: merging would mix a token with later ones",
            block=index,
            advice="tomepass merges encoders; a decoder is left alone",
        )
    mask = argument(attention, 3, "attn_mask")
    if isinstance(mask, fx.Node) and not hides_nothing(mask):
        return Mismatch.at(
            attention,
            f"attention mask {mask.name} is not provably all true: it may be causal, a "
            "padding mask or a position bias",
            block=index,
            advice="call the model without a mask; a decoder is left alone",
        )
    merged = flow.layouts.get(block.merge_at)
    if merged is None or not merged.plain or merged.positions != layout.positions:
        return Mismatch.at(
            block.merge_at,
            f"expected the residual stream as [B, N, C], got {list(shape_of(block.merge_at))}",
            block=index,
        )
    if merged.tokens.dim != 1 or len(shape_of(block.merge_at)) != 3:
        return Mismatch.at(
            block.merge_at,
            f"expected the residual stream as [B, N, C], got {list(shape_of(block.merge_at))}",
            block=index,
        )
    return None


def _schedule(tokens: int, protected: tuple[int, ...], counts: tuple[int, ...]) -> StreamPlan:
    blocks = []
    current, held = tokens, protected
    for index, asked in enumerate(counts):
        r = capped(asked, current, held)
        blocks.append(BlockPlan(index, current, r))
        if r:
            current -= r
            held = tuple(range(len(protected)))
    return StreamPlan(tokens, protected, tuple(blocks))
