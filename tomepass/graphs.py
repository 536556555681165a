"""Small surgeries on graphs: other outputs; for the harness: record, replay, without places."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from tomepass.ops.halt import halt
from tomepass.ops.match import match
from tomepass.ops.match_by import match_by
from tomepass.ops.match_greedy import match_greedy
from tomepass.ops.match_kmeans import match_kmeans
from tomepass.ops.match_sets import match_sets
from tomepass.ops.prune import fuse_rest, order_by, select
from tomepass.ops.sample import sample
from tomepass.ops.threshold import match_threshold

aten = torch.ops.aten

MATCHES = (match, match_by)
"""Operators whose answers are held against the plain reference."""
CHOICES = (
    *(*MATCHES, match_greedy, match_kmeans, match_sets, match_threshold),
    *(order_by, select, fuse_rest, sample, halt),
)
"""All operators that decide which token goes where."""


class Call(NamedTuple):
    """One call of an operator: what went in and what came out."""

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the calls of some operators, and of some nodes, in order."""

    def __init__(
        self, module: fx.GraphModule, targets: Collection[Any], names: Collection[str] = ()
    ) -> None:
        super().__init__(module)
        self.targets, self.names = targets, names
        self.calls: list[Call] = []

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node; keeps what went in and out if its operator is wanted."""
        result = super().run_node(n)
        wanted = n.target in self.targets or n.name in self.names
        if n.op == "call_function" and wanted:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self.calls.append(Call(n, args, kwargs, result))
        return result

    def calls_of(self, *targets: Any) -> list[Call]:
        """The calls of some operators."""
        return [call for call in self.calls if call.node.target in targets]


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


def replayed(module: fx.GraphModule) -> fx.GraphModule:
    """A copy in which all that was decided is a further input: given, not found."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    nodes = list(module.graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            copies[node] = graph.node_copy(node)
    for number, node in enumerate(n for n in nodes if n.target in CHOICES):
        if isinstance(node.meta["val"], Tensor):
            copies[node] = graph.placeholder(f"chosen_{number}")
            continue
        given = [graph.placeholder(f"{name}_{number}") for name in ("assign", "stands")]
        copies[node] = given[0]
        copies.update({user: given[user.args[1]] for user in node.users})
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return _cleaned(module, graph)


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
    return _cleaned(module, graph)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest magnitude of the second; infinite where one is NaN."""
    a, b = ours.double(), theirs.double()
    if not b.numel():
        return 0.0
    scale = float(b.abs().max())
    difference = float((a - b).abs().max())
    error = difference / scale if scale else difference
    return float("inf") if math.isnan(error) else error  # NaN is no greater than a tolerance


def _cleaned(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(module, graph)
