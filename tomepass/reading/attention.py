"""Finds the attentions of a graph, and their queries, keys, values and softmax.

An attention is either one fused operator (``scaled_dot_product_attention``) or written out as a
matrix product, a softmax and a second matrix product.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tomepass.capture.fused_layers import FUSED_LAYERS
from tomepass.capture.regions import bodies
from tomepass.graphs.nodes import FUSED, PRODUCTS, is_pointwise

aten = torch.ops.aten

SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)

_OPERATORS = (torch._ops.OpOverload, torch._ops.HigherOrderOperator)

# As PyTorch and libraries of kernels name operators that attend.
_ATTENTION_NAMES = re.compile("attention|attn", re.IGNORECASE)


# What may stand between the products besides pointwise operators: other views of the scores.
VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.to.dtype,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
    aten.dropout.default,
)


@dataclass(frozen=True)
class Attention:
    """One attention.

    Args:
        query, key, value: what it multiplies, as it sees them.
        weights: the softmax, or the fused operator.
        result: the weighted values: the last product, or the fused operator.
        scores: what leads from the first product to the softmax, both included; none if fused.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    weights: fx.Node
    result: fx.Node
    scores: tuple[fx.Node, ...] = ()


def find_attentions(graph: fx.Graph) -> tuple[list[Attention], list[fx.Node]]:
    """The attentions in order of their results; what may be one but cannot be read as such."""
    found = [_fused(node) for node in graph.find_nodes(op="call_function", target=FUSED)]
    unread = [n for n in graph.nodes if n.target in FUSED_LAYERS or hides_attention(n)]
    for target in SOFTMAXES:
        for softmax in graph.find_nodes(op="call_function", target=target):
            written = _written_out(softmax)
            if isinstance(written, Attention):
                found.append(written)
            elif written:
                unread.append(softmax)
    return sorted(found, key=lambda attention: attention.result), sorted(unread)


def has_attention(graph: fx.Graph) -> bool:
    """Does the graph hold anything that looks like an attention?"""
    return any(find_attentions(graph))


def hides_attention(node: fx.Node) -> bool:
    """Is this an operator that attends inside, by its name or by the graphs it runs?

    FlexAttention is one, kernels of other libraries and the branches of ``torch.cond`` are others.
    """
    operator: Any = node.target
    if operator is FUSED or not isinstance(operator, _OPERATORS):
        return False
    name: str = operator.name()  # type: ignore[no-untyped-call]
    named = _ATTENTION_NAMES.search(name) is not None and not name.startswith("tome::")
    return named or any(has_attention(body.graph) for body in bodies(node))


def operands(product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors a product multiplies, left and right."""
    factors = product.args[:2]
    if product.target is aten.einsum.default:
        factors = tuple(product.args[1])  # type: ignore[arg-type]
    elif product.target is aten.baddbmm.default:
        factors = product.args[1:3]
    if len(factors) != 2 or not all(isinstance(f, fx.Node) for f in factors):
        return None
    return factors  # type: ignore[return-value]


def ignores_first(product: fx.Node) -> bool:
    """Is this a ``baddbmm`` that adds nothing, whose first operand is there for its shape?"""
    return bool(product.target is aten.baddbmm.default and product.kwargs.get("beta", 1) == 0)


def _fused(node: fx.Node) -> Attention:
    query, key, value = node.args[:3]
    return Attention(query, key, value, node, node)  # type: ignore[arg-type]


def _written_out(softmax: fx.Node) -> Attention | bool:
    """The attention around a softmax; True where there is more than one reading of it."""
    above = list(_reach(softmax, up=True))
    below = list(_reach(softmax, up=False))
    first = [node for node in above if node.target in PRODUCTS]
    last = [node for node in below if node.target in PRODUCTS]
    if not first or not last:
        return False
    if len(first) > 1 or len(last) > 1:
        return True
    factors, weighed = operands(first[0]), operands(last[0])
    if factors is None or weighed is None or not (weighed[0] is softmax or weighed[0] in below):
        return True
    return Attention(*factors, weighed[1], softmax, last[0], _between(first[0], softmax, above))


def _between(product: fx.Node, softmax: fx.Node, above: list[fx.Node]) -> tuple[fx.Node, ...]:
    chain = {product}
    for node in sorted({*above, softmax}):
        if any(operand in chain for operand in node.all_input_nodes):
            chain.add(node)
    return tuple(sorted(chain))


def _reach(softmax: fx.Node, *, up: bool) -> Iterator[fx.Node]:
    """What leads to a softmax, or away from it, as far as the nearest products."""
    seen: set[fx.Node] = set()
    frontier = [softmax]
    while frontier:
        node = frontier.pop()
        for other in node.all_input_nodes if up else node.users:
            passes = is_pointwise(other) or other.target in VIEWS
            if other not in seen and (passes or other.target in PRODUCTS):
                seen.add(other)
                yield other
                if other.target not in PRODUCTS:
                    frontier.append(other)
