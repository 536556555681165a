"""Small surgeries on graphs: other outputs; for the harness: record, replay, without places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

aten = torch.ops.aten


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose operators can be changed."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(module, graph)


def only_outputs(module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """A copy of a graph that returns some of its nodes alone, and runs what they need alone."""
    named = {node.name: node for node in module.graph.nodes}
    # Dead code elimination would keep dropout and attention, which may draw random numbers.
    needed = {node for node in named.values() if node.op == "placeholder"}
    waiting = [named[name] for name in names]
    while waiting:
        if (node := waiting.pop()) not in needed:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[named[name]] for name in names))
    return fx.GraphModule(module, graph)


def with_outputs(module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """A copy of a graph that returns a pair: its outputs, and some of its nodes."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    outputs = graph.graph_copy(module.graph, copies)
    named = {node.name: copy for node, copy in copies.items()}
    graph.output((outputs, tuple(named[name] for name in names)))
    return fx.GraphModule(module, graph)


def without_places(module: fx.GraphModule, places: Mapping[str, int | None]) -> fx.GraphModule:
    """A copy in which the named tensors say nothing about where a token stands.

    Args:
        places: by a node's name: None makes it zero to all its readers, a dimension, counted from
            the end, gives all rows along it the values of the first.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copies[node] = copy = graph.node_copy(node, copies.__getitem__)
        if node.name not in places:
            continue
        if (dim := places[node.name]) is None:
            copies[node] = graph.call_function(aten.zeros_like.default, (copy,))
        else:
            first = graph.call_function(aten.slice.Tensor, (copy, dim, 0, 1))
            copies[node] = graph.call_function(aten.expand_as.default, (first, copy))
    return cleaned(module, graph)


def cleaned(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(module, graph)
