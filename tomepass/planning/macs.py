"""Multiply-accumulates of a graph, per image, counted operator by operator.

Papers write "GFLOPs" for these. What matching and merging cost is counted apart.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from tomepass.graphs.canonical import CanonicalGraph
from tomepass.graphs.nodes import FUSED, argument
from tomepass.ops.attending.attention_to import attention_to
from tomepass.ops.dropping.keep_score import keep_score, keep_score_linear
from tomepass.ops.dropping.prune import nearest
from tomepass.ops.matching.match import match
from tomepass.ops.matching.match_by import match_by
from tomepass.ops.matching.match_greedy import match_greedy
from tomepass.ops.matching.match_kmeans import match_kmeans
from tomepass.ops.matching.match_sets import energy, match_sets
from tomepass.ops.merging.combine import mlerp
from tomepass.ops.merging.merge import merge
from tomepass.ops.merging.side import merge_bias, merge_rows

aten = torch.ops.aten


def batch_sizes(captured: CanonicalGraph) -> list[Any]:
    """The first dimension of each of the user's tensors that has one: ints or SymInts."""
    inputs = captured.graph.find_nodes(op="placeholder")
    given = [node.meta["val"] for node in inputs if node.name in captured.data]
    return [value.shape[0] for value in given if value.ndim]


def batch_of(captured: CanonicalGraph) -> int:
    """The batch the graph's example values have: the dimension that is not fixed, if one is not."""
    sizes = batch_sizes(captured)
    symbolic = [size for size in sizes if not isinstance(size, int)]
    return _hint((symbolic or sizes or [1])[0])


def node_macs(node: fx.Node) -> int:
    """Multiply-accumulates of one node on its example values.

    0 for all that is not a product, and for one with a size only known when it runs.
    """
    count = _MACS.get(node.target)
    if count is None or node.op != "call_function":
        return 0
    try:
        return count(node)
    except _OpenSize:
        return 0


def macs_by_name(captured: CanonicalGraph) -> dict[str, int]:
    """Multiply-accumulates of each node per image; what no output reads costs nothing."""
    return graph_macs(captured.graph, batch_of(captured))


def graph_macs(graph: fx.Graph, batch: int) -> dict[str, int]:
    """The same of any graph, rewritten ones too, whose example values have such a batch."""
    read = set(graph.output_node().all_input_nodes)
    macs = {}
    for node in reversed(graph.nodes):
        macs[node.name] = node_macs(node) // batch if node in read else 0
        read.update(node.all_input_nodes if node in read else ())
    return macs


def _shape(node: Any) -> list[int]:
    value: Tensor = node.meta["val"]
    return [_hint(s) for s in value.shape]


class _OpenSize(Exception):
    """A size that data decide has no example value."""


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    if (hint := size.node.hint) is None:
        raise _OpenSize
    return int(hint)


def _linear(node: fx.Node) -> int:
    return prod(_shape(node)) * _shape(node.args[0])[-1]


def _matmul(node: fx.Node) -> int:
    return prod(_shape(node)) * _shape(node.args[0])[-1]


def _einsum(node: fx.Node) -> int:
    terms = str(node.args[0]).replace(" ", "").split("->")[0].split(",")
    if len(terms) != 2 or "." in str(node.args[0]):
        return 0
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, node.args[1], strict=True):  # type: ignore[arg-type]
        sizes.update(zip(term, _shape(operand), strict=True))
    return prod(sizes.values())


def _addmm(node: fx.Node) -> int:
    return prod(_shape(node)) * _shape(node.args[1])[-1]


def _convolution(node: fx.Node) -> int:
    # Each output element sums over (channels / groups) * kernel.
    return prod(_shape(node)) * prod(_shape(node.args[1])[1:])


def _attention(node: fx.Node) -> int:
    query, key, value = (_shape(a) for a in node.args[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _match(node: fx.Node) -> int:
    batch, _, tokens, width = _shape(node.args[0])
    protected = len(argument(node, 2, "protected"))
    free = tokens - protected
    return batch * (free // 2) * (free - free // 2) * width


def _all_pairs(node: fx.Node) -> int:
    batch, _, tokens, width = _shape(node.args[0])
    return batch * tokens * tokens * width


def _match_kmeans(node: fx.Node) -> int:
    batch, _, tokens, width = _shape(node.args[0])
    clusters = tokens - len(argument(node, 2, "protected")) - int(argument(node, 1, "r"))
    iterations = int(argument(node, 5, "iterations"))
    return batch * tokens * clusters * width * (2 * iterations - 1)


def _match_sets(node: fx.Node) -> int:
    batch, _, _, width = _shape(node.args[0])
    return batch * _shape(node.args[1])[1] * _shape(node.args[2])[1] * width


def _nearest(node: fx.Node) -> int:
    batch, _, tokens, width = _shape(node.args[0])
    return batch * tokens * _shape(node.args[1])[1] * width


def _attention_to(node: fx.Node) -> int:
    batch, heads, tokens, width = _shape(node.args[0])
    paying = len(argument(node, 3, "queries")) or tokens
    return batch * heads * paying * _shape(node.args[1])[2] * width


def _keep_score(node: fx.Node) -> int:
    batch, tokens, _ = _shape(node.args[0])
    held: list[fx.Node] = node.args[2]  # type: ignore[assignment]
    matrices = [shape for shape in map(_shape, held) if len(shape) == 2]
    return batch * tokens * sum(prod(shape) for shape in matrices)


def _merge_rows(node: fx.Node) -> int:
    return prod(_shape(node)) * _shape(node.args[1])[-1]


def _merge_bias(node: fx.Node) -> int:
    batch, heads, rows, columns = _shape(node)
    before = _shape(node.args[1])[-1]
    return batch * heads * columns * before * (before + rows)


def _merge(node: fx.Node) -> int:
    batch, tokens, width = _shape(node.args[0])
    return batch * tokens * _shape(node)[1] * width


_MACS: dict[Any, Callable[[fx.Node], int]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    aten.mv.default: _matmul,
    aten.dot.default: _matmul,
    aten.vdot.default: _matmul,
    aten._int_mm.default: _matmul,
    aten.baddbmm.default: _addmm,
    aten.einsum.default: _einsum,
    aten.addmm.default: _addmm,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv2d.padding: _convolution,
    aten.conv3d.default: _convolution,
    aten.convolution.default: _convolution,
    FUSED: _attention,
    match: _match,
    match_by: _match,
    match_greedy: _all_pairs,
    match_kmeans: _match_kmeans,
    match_sets: _match_sets,
    nearest: _nearest,
    energy: _all_pairs,
    attention_to: _attention_to,
    merge: _merge,
    mlerp: _merge,
    keep_score: _keep_score,
    keep_score_linear: _keep_score,
    merge_rows: _merge_rows,
    merge_bias: _merge_bias,
}
