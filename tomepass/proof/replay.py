"""Running a graph and noting what chosen operators take and return."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

from torch import Tensor, fx

from tomepass.graphs.surgery import cleaned
from tomepass.ops.choices import CHOICES


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
    return cleaned(module, graph)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest magnitude of the second; infinite where one is NaN."""
    a, b = ours.double(), theirs.double()
    if not b.numel():
        return 0.0
    scale = float(b.abs().max())
    difference = float((a - b).abs().max())
    error = difference / scale if scale else difference
    return float("inf") if math.isnan(error) else error  # NaN is no greater than a tolerance
