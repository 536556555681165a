"""What planning returns: for each residual stream the blocks, and how many tokens go in each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tomepass.counts.blocks import StreamPlan
from tomepass.methods import Method
from tomepass.reading.layouts import Attended, Carried, Layout, Side
from tomepass.reading.mismatch import Mismatch
from tomepass.reading.structure import Stream
from tomepass.reading.tokens import TokenFlow


@dataclass(frozen=True)
class PlannedStream:
    """A stream with its analysis and its plan: what the rewrite needs.

    Args:
        stream: its blocks.
        layout: of its entry.
        flow: where its tokens go.
        inner: everything its last merge depends on: there is merging still to come.
        plan: the counts.
        padding: the mask that hides padding from all its attentions, if there is one.
    """

    stream: Stream
    layout: Layout
    flow: TokenFlow
    inner: frozenset[fx.Node]
    plan: StreamPlan
    padding: fx.Node | None = None

    @property
    def sides(self) -> tuple[Side, ...]:
        """What lies beside the tokens inside the stream, a row each."""
        found: dict[Side, None] = {}
        for node, outcome in self.flow.outcomes.items():
            if node not in self.inner:
                continue
            if isinstance(outcome, Carried):
                found.update(dict.fromkeys(outcome.sides))
            elif isinstance(outcome, Attended) and outcome.bias is not None:
                found[Side(outcome.bias, "bias")] = None
        return tuple(found)


@dataclass(frozen=True)
class Planned:
    """All that was read off a graph and decided for it."""

    method: Method
    streams: tuple[PlannedStream, ...]
    mismatches: tuple[Mismatch, ...]
