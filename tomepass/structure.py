"""Stage 2: blocks and residual streams, found by dominance and dataflow alone.

A residual sum adds a branch back to the value the branch was computed from. In graph terms:
the sum post-dominates an attention (everything the attention computes goes through it), and its
other operand dominates that attention (everything the attention reads came through it). That
operand is the block's entry. LayerScale, DropPath, operand order, fused or split projections
and the kind of MLP never show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import networkx as nx
import torch
from torch import Tensor, fx

from tomepass.axis import same_shape
from tomepass.capture import CanonicalGraph, source_line

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
SUMS = (aten.add.Tensor, aten.add_.Tensor)
SOFTMAXES = (aten.softmax.int, aten._softmax.default)
MATMULS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)

# Stands above all inputs in the dominator tree.
ROOT = "inputs"


@dataclass(frozen=True)
class Mismatch:
    """Why something is left alone: a value, not an exception.

    Args:
        reason: what was expected and what came.
        block: index of the block, if one is concerned.
        node: the graph node.
        source: the model's source line behind it.
        advice: what the user can do about it.
    """

    reason: str
    block: int | None = None
    node: str | None = None
    source: str | None = None
    advice: str | None = None

    @staticmethod
    def at(
        node: fx.Node, reason: str, *, block: int | None = None, advice: str | None = None
    ) -> Mismatch:
        """A mismatch at a node, with its source line."""
        return Mismatch(reason, block, node.name, source_line(node), advice)


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Args:
        index: counted along its stream.
        entry: the stream's node the block starts from, before its norm.
        attention: the attention node; its first three arguments are query, key, value.
        join: the residual sum that ends the attention half.
        merge_at: the stream's node after which tokens merge: the sum, or the norm after it.
    """

    index: int
    entry: fx.Node
    attention: fx.Node
    join: fx.Node
    merge_at: fx.Node

    @property
    def key(self) -> fx.Node:
        """The keys as attention sees them."""
        return _arg(self, 1)

    @property
    def query(self) -> fx.Node:
        """The queries as attention sees them."""
        return _arg(self, 0)

    @property
    def value(self) -> fx.Node:
        """The values as attention sees them."""
        return _arg(self, 2)


@dataclass(frozen=True)
class Stream:
    """A residual stream: blocks in order, each computed from the one before."""

    blocks: tuple[Block, ...]

    @property
    def entry(self) -> fx.Node:
        """The embedded tokens."""
        return self.blocks[0].entry


@dataclass(frozen=True)
class Structure:
    """What stage 2 found.

    Args:
        streams: the residual streams.
        others: the attentions that belong to none, and why. One written by hand is its softmax.
    """

    streams: tuple[Stream, ...]
    others: Mapping[fx.Node, Mismatch]


def find_structure(captured: CanonicalGraph) -> Structure:
    """The streams of a graph, first to last, and the attentions that are no block's."""
    flow = Dataflow(captured)
    chains: list[list[Block]] = []
    others: dict[fx.Node, Mismatch] = {}
    fused, manual = attention_nodes(captured.graph), manual_attentions(captured.graph)
    for number, attention in enumerate(sorted([*fused, *manual], key=flow.order.__getitem__)):
        upstream = upstream_of(attention)
        above = [
            c
            for c in chains
            if c[-1].merge_at in upstream and flow.dominates(c[0].entry, attention)
        ]
        chain = above[-1] if above else []
        found = _block(flow, attention, len(chain))
        if isinstance(found, Mismatch):
            others[attention] = replace(found, block=number)
            continue
        if not chain:
            chains.append(chain)
        chain.append(found)
    return Structure(tuple(Stream(tuple(chain)) for chain in chains), others)


def attention_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The fused attentions of a graph, in order."""
    return list(graph.find_nodes(op="call_function", target=ATTENTION))


def manual_attentions(graph: fx.Graph) -> list[fx.Node]:
    """Softmaxes that feed a matrix product and were fed by one: attention written by hand."""
    return [
        node
        for softmax in SOFTMAXES
        for node in graph.find_nodes(op="call_function", target=softmax)
        if _near(node, MATMULS, up=True) and _near(node, MATMULS, up=False)
    ]


def manual_attention(graph: fx.Graph) -> fx.Node | None:
    """The first attention written by hand."""
    return next(iter(manual_attentions(graph)), None)


def upstream_of(node: fx.Node) -> set[fx.Node]:
    """Every node that ``node`` depends on."""
    above: set[fx.Node] = set()
    frontier = [node]
    while frontier:
        for operand in frontier.pop().all_input_nodes:
            if operand not in above:
                above.add(operand)
                frontier.append(operand)
    return above


class Dataflow:
    """Dominance over the tensors that depend on the user's inputs and reach an output.

    What an attention's mask is made from does not count: whether it may merge is asked later.
    """

    def __init__(self, captured: CanonicalGraph) -> None:
        self.order = {node: i for i, node in enumerate(captured.graph.nodes)}
        self.output = captured.graph.output_node()
        flow: nx.DiGraph[fx.Node | str] = nx.DiGraph()
        for node in captured.graph.nodes:
            if node.op == "placeholder" and node.name in captured.data:
                flow.add_edge(ROOT, node)
            elif node.op == "output" or is_tensor(node):
                flow.add_edges_from((a, node) for a in _operands(node) if a in flow)
        live = nx.ancestors(flow, self.output) | {self.output} if self.output in flow else set()
        self.flow = flow.subgraph(live)
        self._above = nx.immediate_dominators(self.flow, ROOT) if live else {}
        self._below = nx.immediate_dominators(self.flow.reverse(), self.output) if live else {}
        self._spans = _tree_spans(self._above)

    def __contains__(self, node: object) -> bool:
        return node in self.flow

    def dominates(self, above: fx.Node, below: fx.Node) -> bool:
        """Does every path from an input to ``below`` pass through ``above``?"""
        if above not in self._spans or below not in self._spans:
            return False
        first, last = self._spans[above]
        return first <= self._spans[below][0] < last

    def after(self, node: fx.Node) -> Iterator[fx.Node]:
        """The nodes that every path from ``node`` to an output passes through, nearest first."""
        while (below := self._below.get(node)) is not None and below is not node:
            if below is self.output:
                return
            yield below
            node = below

    def readers(self, node: fx.Node) -> int:
        """How many live tensors read ``node``."""
        return int(self.flow.out_degree(node))


def _operands(node: fx.Node) -> list[fx.Node]:
    if node.target is ATTENTION:
        return [a for a in node.args[:3] if isinstance(a, fx.Node)]
    return node.all_input_nodes


def is_tensor(node: fx.Node) -> bool:
    """Does the node hold a tensor, or several?"""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return any(isinstance(v, Tensor) for v in value)
    return isinstance(value, Tensor)


def _block(flow: Dataflow, attention: fx.Node, index: int) -> Block | Mismatch:
    if attention.target is not ATTENTION:
        return Mismatch.at(
            attention,
            "attention is written out as matmul, softmax, matmul here; "
            "expected scaled_dot_product_attention",
            advice='load the model with attn_implementation="sdpa" where it has that, and without '
            "output_attentions",
        )
    if attention not in flow:
        return Mismatch.at(attention, "this attention does not read the model's input")
    foreign = None
    for join in flow.after(attention):
        for term in _earlier_terms(flow, join, attention):
            if flow.dominates(term, attention):
                return Block(index, term, attention, join, _stream_node(flow, join))
            foreign = foreign or join
    if foreign is not None:
        return Mismatch.at(
            foreign,
            "expected a residual sum of an attention and the value it was computed from; "
            "this sum adds another value",
        )
    return Mismatch.at(
        attention, "no residual sum follows this attention: it is not a transformer block's"
    )


def _earlier_terms(flow: Dataflow, join: fx.Node, attention: fx.Node) -> Iterator[fx.Node]:
    """What a sum adds that was there before the attention ran, sums within it taken apart."""
    if join.target not in SUMS:
        return
    for operand in join.args[:2]:
        if (
            isinstance(operand, fx.Node)
            and operand in flow
            and flow.order[operand] < flow.order[attention]
            and same_shape(operand, join)
        ):
            yield operand
            yield from _earlier_terms(flow, operand, attention)


def _stream_node(flow: Dataflow, join: fx.Node) -> fx.Node:
    # Pre-norm: the sum fans out to the norm and the next sum. Post-norm: the norm does.
    # With the MLP beside the attention, the sum after this one; the last may not fan out.
    last = join
    for node in (join, *flow.after(join)):
        if not same_shape(node, join):
            break
        if flow.readers(node) > 1:
            return node
        last = node if node.target in SUMS else last
    return last


def _tree_spans(parents: dict[fx.Node, fx.Node]) -> dict[fx.Node | str, tuple[int, int]]:
    """Depth-first intervals of the dominator tree: ancestors' intervals enclose descendants'."""
    # networkx has mapped the root to itself and, from 3.6, to None.
    tree: nx.DiGraph[fx.Node | str] = nx.DiGraph(
        (p, n) for n, p in parents.items() if p is not None and p is not n
    )
    spans: dict[fx.Node | str, tuple[int, int]] = {}
    first: dict[fx.Node | str, int] = {}
    clock = 0
    if ROOT not in tree:
        return spans
    for _, node, label in nx.dfs_labeled_edges(tree, ROOT):
        if label == "forward":
            first[node] = clock
            clock += 1
        elif label == "reverse":
            spans[node] = (first[node], clock)
    return spans


def _near(node: fx.Node, targets: tuple[object, ...], *, up: bool, steps: int = 6) -> bool:
    frontier = [node]
    for _ in range(steps):
        frontier = [n for f in frontier for n in (f.all_input_nodes if up else f.users)]
        if any(n.target in targets for n in frontier):
            return True
    return False


def _arg(block: Block, index: int) -> fx.Node:
    node = block.attention.args[index]
    assert isinstance(node, fx.Node)
    return node
