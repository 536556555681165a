"""Finds operators that write in place in a way that reading the graph by dataflow would miss.

``relu_(linear(x))`` and ``mm(x, w).view(shape).add_(bias)`` write in place, but nobody reads what
they overwrote: they can be read as plain results. A write into a slice of a tensor that is read
again cannot: nothing in the graph says that the later reader depends on what was written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from tomepass.reading.origins import input_dependent


def hidden_write(graph: fx.Graph, data: frozenset[str]) -> fx.Node | None:
    """The first operator that writes, unseen by dataflow, where the user's input takes part."""
    nodes: list[fx.Node] = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    dependent = input_dependent(graph, data)
    for node in nodes:
        for target in _written(node) if node in dependent else ():
            memory = _memory(target)
            later = any(order[r] > order[node] for r in _readers(memory))
            if (memory is not target and memory.op == "placeholder") or later:
                return node
    return None


def _written(node: fx.Node) -> Iterator[fx.Node]:
    for argument, value in zip(_arguments(node), node.args, strict=False):
        info = argument.alias_info
        if info is not None and info.is_write and isinstance(value, fx.Node):
            yield value


def _memory(node: fx.Node) -> fx.Node:
    """The node that made the memory a chain of views shows."""
    while _is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a node's memory, through views of it too."""
    for user in node.users:
        yield user
        if _is_view(user):
            yield from _readers(user)


def _is_view(node: fx.Node) -> bool:
    """Does the result share memory with an operand that it does not write to?"""
    return any(
        argument.alias_info is not None and not argument.alias_info.is_write
        for argument in _arguments(node)
    )


def _arguments(node: fx.Node) -> list[torch.Argument]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    return list(node.target._schema.arguments)
