"""What planning returns: for each residual stream the blocks, and how many tokens go in each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tomepass.counts.blocks import StreamPlan
from tomepass.counts.schedule import CountsError
from tomepass.errors import Refused
from tomepass.graphs.origin import source_line
from tomepass.methods import Method
from tomepass.reading.layouts import Attended, Carried, Layout, Side
from tomepass.reading.mismatch import Mismatch
from tomepass.reading.structure import Stream
from tomepass.reading.tokens import TokenFlow


class CountsRefused(Refused, ValueError):
    """A method that counts for more blocks than a stream has.

    A ValueError as well, since it is the method's fault and not the model's.
    """


def plan_of(
    method: Method,
    stream: Stream,
    tokens: int,
    protected: tuple[int, ...],
    number: int,
    streams: int,
) -> StreamPlan:
    """The counts of a method for a stream.

    Args:
        tokens: entering the stream.
        protected: positions that are never reduced.
        number: of the stream, as reports count them.
        streams: how many there are.

    Raises:
        CountsRefused: if the method counts for more blocks than the stream has; it says which
            stream has how many.
    """
    depth = len(stream.blocks)
    try:
        return method.plan(tokens, protected, depth)
    except CountsError as error:
        which = f"stream {number} of {streams}" if streams > 1 else "its one stream"
        raise CountsRefused(
            f"{error} ({which} takes {tokens} tokens through {depth} blocks)",
            source=source_line(stream.blocks[0].attention.result),
            advice="a method is for every stream, so the one with the fewest blocks sets the "
            "limit; tomepass.explain(model, r=0) shows the blocks of all",
        ) from error


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
