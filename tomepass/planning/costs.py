"""What merging saves: multiply-accumulates as a function of the tokens left, before any rewrite."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from torch import fx

from tomepass.counts.blocks import StreamPlan
from tomepass.planning.macs import macs_by_name
from tomepass.planning.streams import plan_of
from tomepass.reading.layouts import Attended, Carried, Outcome, Positional

if TYPE_CHECKING:
    from tomepass.graphs.canonical import CanonicalGraph
    from tomepass.methods import Method
    from tomepass.planning.streams import PlannedStream


@dataclass(frozen=True)
class Product:
    """One operator whose multiply-accumulates fall with the tokens.

    Args:
        macs: per image, with all tokens.
        after: blocks whose merges it comes after.
        lengths: tokens along each token axis it runs over, before any merge.
    """

    macs: int
    after: int
    lengths: tuple[int, ...]

    def saved(self, gone: int) -> float:
        """Multiply-accumulates saved when so many tokens have merged."""
        return self.macs * (1 - prod((n - gone) / n for n in self.lengths))


@dataclass(frozen=True)
class StreamCosts:
    """The products of one stream."""

    products: tuple[Product, ...]

    def saved(self, plan: StreamPlan) -> float:
        """Multiply-accumulates per image that a plan saves."""
        left = (plan.tokens, *(block.tokens_out for block in plan.blocks))
        return sum(p.saved(plan.tokens - left[p.after]) for p in self.products)


@dataclass(frozen=True, eq=False)
class ModelCosts:
    """What all streams of a model cost, and what a method saves of it; nothing is run.

    Args:
        streams: with their layouts; their plans do not count.
        of: the costs of each.
        total: multiply-accumulates per image of the whole model.
    """

    streams: tuple[PlannedStream, ...]
    of: tuple[StreamCosts, ...]
    total: int

    @staticmethod
    def read(captured: CanonicalGraph, streams: Iterable[PlannedStream]) -> ModelCosts:
        """Off a graph."""
        macs, read = macs_by_name(captured), tuple(streams)
        costs = tuple(stream_costs(captured, stream, macs) for stream in read)
        return ModelCosts(read, costs, sum(macs.values()))

    @property
    def depth(self) -> int:
        """Blocks of the deepest stream."""
        return max(len(stream.stream.blocks) for stream in self.streams)

    @property
    def tokens(self) -> int:
        """Of the longest stream."""
        return max(stream.plan.tokens for stream in self.streams)

    def planned(self, method: Method) -> tuple[PlannedStream, ...]:
        """The streams under a method whose counts are those of the deepest."""
        schedule, planned = method.schedule, []
        for number, stream in enumerate(self.streams):
            own, fitting = len(stream.stream.blocks), method
            if own < self.depth and schedule.kind == "list":
                fitting = method.replace(r=[int(count) for count in schedule.values[:own]])
            held, count = stream.plan, len(self.streams)
            plan = plan_of(fitting, stream.stream, held.tokens, held.protected, number, count)
            planned.append(replace(stream, plan=plan))
        return tuple(planned)

    def share(self, method: Method) -> float:
        """The share of the multiply-accumulates that a method leaves."""
        pairs = zip(self.of, self.planned(method), strict=True)
        return (self.total - sum(costs.saved(stream.plan) for costs, stream in pairs)) / self.total


def stream_costs(
    captured: CanonicalGraph, planned: PlannedStream, macs: dict[str, int]
) -> StreamCosts:
    """Reads off a graph what a stream's products cost, and after which merges they come.

    Args:
        macs: of each node, as :func:`tomepass.macs.macs_by_name` counts them.
    """
    merged_at = {block.merge_at: block.index + 1 for block in planned.stream.blocks}
    after = {planned.stream.entry: 0}
    products = []
    for node in captured.graph.nodes:
        outcome = planned.flow.outcomes.get(node)
        if outcome is not None and not isinstance(outcome, Positional):
            reached = _reached(node, outcome, planned, after)
            if macs[node.name]:
                products.append(Product(macs[node.name], reached, _lengths(node, outcome, planned)))
            if node in planned.flow.layouts:
                after[node] = reached
        if node in merged_at:
            after[node] = merged_at[node]
    return StreamCosts(tuple(products))


def _reached(
    node: fx.Node, outcome: Outcome, planned: PlannedStream, after: dict[fx.Node, int]
) -> int:
    """After how many blocks' merges the tokens come that a node works on."""
    held = {after[a] for a in node.all_input_nodes if a in after}
    beyond = node not in planned.inner
    # Behind the last merge, what does not fit the merged tokens is unmerged first.
    if beyond and (len(held) > 1 or (isinstance(outcome, Carried) and outcome.sides)):
        return 0
    return max(held, default=0)


def _lengths(node: fx.Node, outcome: Outcome, planned: PlannedStream) -> tuple[int, ...]:
    layouts = planned.flow.layouts
    if isinstance(outcome, Attended):
        held = [outcome.keys] if outcome.layout is None else [outcome.keys, outcome.layout]
        return tuple(len(layout.positions) for layout in held)
    own = layouts.get(node)
    lengths = [len(own.positions)] * len(own.axes) if own is not None else []
    for operand in (layouts[a] for a in node.all_input_nodes if a in layouts):
        # A product with attention weights sums over the keys.
        if operand.weights and (own is None or own.columns is None):
            lengths.append(len(operand.positions))
    return tuple(lengths)
