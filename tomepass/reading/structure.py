"""Finds the residual streams of a graph and their transformer blocks, from dataflow alone.

A residual sum adds a branch to the value that the branch was computed from. In terms of the graph:
everything the attention computes goes through the sum (the sum post-dominates the attention), and
everything the attention reads comes through the other operand of the sum (that operand dominates
the attention). That operand is where the block begins. LayerScale, DropPath, the order of operands,
fused or split projections and the kind of MLP make no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import networkx as nx
import torch
from torch import fx

from tomepass.capture.fused_layers import FUSED_LAYERS
from tomepass.graphs.canonical import CanonicalGraph
from tomepass.graphs.nodes import FUSED, is_tensor, same_shape, target_name
from tomepass.reading.attention import Attention, find_attentions, hides_attention
from tomepass.reading.mismatch import Mismatch

aten = torch.ops.aten

SUMS = (aten.add.Tensor, aten.add_.Tensor)

# Stands above all inputs in the dominator tree.
ROOT = "inputs"


_OTHER_SPELLING = (
    'load the model with attn_implementation="sdpa" where it has that, and without '
    "output_attentions"
)


_INSIDE = (
    "this attention is inside a fused layer that takes a mask or returns its weights, where it "
    "cannot be rewritten"
)


_UNREAD = (
    "expected attention as product, softmax, product; around this softmax there is more than one "
    "product to choose from (decomposed position biases are written so)"
)


_IN_SIGHT = (
    'load the model with attn_implementation="sdpa" where it has that (or call '
    'model.set_attn_implementation("sdpa")), or call scaled_dot_product_attention, outside of '
    "torch.cond and of loops that torch traces"
)


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Args:
        index: counted along its stream.
        entry: the stream's node the block starts from, before its norm.
        attention: the attention, fused or written out.
        join: the residual sum that ends the attention half.
        merge_at: the stream's node after which tokens merge: the sum, or the norm after it.
    """

    index: int
    entry: fx.Node
    attention: Attention
    join: fx.Node
    merge_at: fx.Node


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
        others: the attentions that belong to none, by their result, and why.
        ancestry: what depends on what.
    """

    streams: tuple[Stream, ...]
    others: Mapping[fx.Node, Mismatch]
    ancestry: Ancestry


def find_structure(captured: CanonicalGraph) -> Structure:
    """The streams of a graph, first to last, and the attentions that are no block's."""
    attentions, unread = find_attentions(captured.graph)
    flow, ancestry = Dataflow(captured, attentions), Ancestry(captured.graph)
    chains: list[list[Block]] = []
    others: dict[fx.Node, Mismatch] = {}
    places = sorted([*unread, *(attention.result for attention in attentions)])
    for node in unread:
        reason, advice = _unread(node)
        block = places.index(node)
        others[node] = Mismatch.at(node, reason, block=block, advice=advice)
    for attention in attentions:
        above = [
            chain
            for chain in chains
            if ancestry.depends(attention.result, chain[-1].merge_at)
            and flow.dominates(chain[0].entry, attention.result)
        ]
        chain = above[-1] if above else []
        found = _block(flow, attention, len(chain))
        if isinstance(found, Mismatch):
            others[attention.result] = replace(found, block=places.index(attention.result))
            continue
        if not chain:
            chains.append(chain)
        chain.append(found)
    return Structure(tuple(Stream(tuple(chain)) for chain in chains), others, ancestry)


def _unread(node: fx.Node) -> tuple[str, str]:
    """Why an attention cannot be read, and what to do about it."""
    if node.target in FUSED_LAYERS:
        return _INSIDE, _OTHER_SPELLING
    if hides_attention(node):
        name = target_name(node)
        return f"this attention is computed inside {name}, where it cannot be rewritten", _IN_SIGHT
    return _UNREAD, _OTHER_SPELLING


class Ancestry:
    """What depends on what, for all pairs of nodes at once: a bit a node."""

    def __init__(self, graph: fx.Graph) -> None:
        self._bit = {node: 1 << i for i, node in enumerate(graph.nodes)}
        self._above: dict[fx.Node, int] = {}
        for node in graph.nodes:
            above = 0
            for operand in node.all_input_nodes:
                above |= self._above[operand] | self._bit[operand]
            self._above[node] = above

    def depends(self, node: fx.Node, other: fx.Node) -> bool:
        """Does ``node`` depend on ``other``?"""
        return bool(self._above[node] & self._bit[other])

    def of(self, node: fx.Node) -> frozenset[fx.Node]:
        """Every node that ``node`` depends on."""
        above = self._above[node]
        return frozenset(other for other, bit in self._bit.items() if above & bit)


class Dataflow:
    """Dominance over the tensors that depend on the user's inputs and reach an output.

    What an attention's mask is made from does not count: whether it may merge is asked later.
    """

    def __init__(self, captured: CanonicalGraph, attentions: Sequence[Attention] = ()) -> None:
        # Of what stands between the products of an attention, only the scores themselves.
        self._chains = {n: set(a.scores) for a in attentions for n in a.scores[1:]}
        self.order = {node: i for i, node in enumerate(captured.graph.nodes)}
        self.output = captured.graph.output_node()
        flow: nx.DiGraph[fx.Node | str] = nx.DiGraph()
        for node in captured.graph.nodes:
            if node.op == "placeholder" and node.name in captured.data:
                flow.add_edge(ROOT, node)
            elif node.op == "output" or is_tensor(node):
                flow.add_edges_from((a, node) for a in self._operands(node) if a in flow)
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

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        if node.target is FUSED:
            return [a for a in node.args[:3] if isinstance(a, fx.Node)]
        chain = self._chains.get(node)
        return [a for a in node.all_input_nodes if chain is None or a in chain]


def _block(flow: Dataflow, attention: Attention, index: int) -> Block | Mismatch:
    result = attention.result
    if result not in flow:
        return Mismatch.at(result, "this attention does not read the model's input")
    foreign = None
    for join in flow.after(result):
        for term in _earlier_terms(flow, join, result):
            if flow.dominates(term, result):
                return Block(index, term, attention, join, _stream_node(flow, join))
            foreign = foreign or join
    if foreign is not None:
        return Mismatch.at(
            foreign,
            "expected a residual sum of an attention and the value it was computed from; "
            "this sum adds another value",
        )
    return Mismatch.at(
        result, "no residual sum follows this attention: it is not a transformer block's"
    )


def _earlier_terms(flow: Dataflow, join: fx.Node, attention: fx.Node) -> Iterator[fx.Node]:
    """What a sum adds that was there before the attention ran, sums within it taken apart."""
    seen: set[fx.Node] = set()
    waiting = [join]
    while waiting:
        node = waiting.pop()
        if node is not join:
            yield node
        if node.target not in SUMS:
            continue
        for operand in reversed(node.args[:2]):
            if (
                isinstance(operand, fx.Node)
                and operand in flow
                and operand not in seen
                and flow.order[operand] < flow.order[attention]
                and same_shape(operand, join)
            ):
                seen.add(operand)
                waiting.append(operand)


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
    tree: nx.DiGraph[fx.Node | str] = nx.DiGraph()
    tree.add_edges_from((p, n) for n, p in parents.items() if p is not None and p is not n)
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
