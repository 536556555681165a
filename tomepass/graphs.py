"""Small surgeries on graphs, for the harness: record, replay, zero."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from tomepass.ops.match import match


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the inputs and results of some operators."""

    def __init__(self, module: fx.GraphModule, targets: Collection[Any]) -> None:
        super().__init__(module)
        self.targets = targets
        self.recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node; keeps what went in and out if its operator is wanted."""
        result = super().run_node(n)
        if n.op == "call_function" and n.target in self.targets:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self.recorded.append((n.target, args, kwargs, result))
        return result

    def calls(self, target: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Arguments and result of each call, in order."""
        for args, result, _ in self.calls_with_kwargs(target):
            yield args, result

    def calls_with_kwargs(self, target: Any) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
        """Arguments, result and keyword arguments of each call, in order."""
        for recorded, args, kwargs, result in self.recorded:
            if recorded is target:
                yield args, result, kwargs


def replayed(module: fx.GraphModule) -> fx.GraphModule:
    """A copy in which every match is a further input: the assignments are given, not found."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    nodes = list(module.graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            copies[node] = graph.node_copy(node)
    for number, node in enumerate(n for n in nodes if n.target is match):
        copies[node] = graph.placeholder(f"assign_{number}")
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return _cleaned(module, graph)


def zeroed(module: fx.GraphModule, names: Collection[str]) -> fx.GraphModule:
    """A copy in which the named tensors are zero to all their readers."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.name in names:
            copies[node] = graph.call_function(torch.ops.aten.zeros_like.default, (copies[node],))
    return _cleaned(module, graph)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest magnitude of the second."""
    a, b = ours.double(), theirs.double()
    if not b.numel():
        return 0.0
    scale = float(b.abs().max())
    difference = float((a - b).abs().max())
    return difference / scale if scale else difference


def _cleaned(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(module, graph)
