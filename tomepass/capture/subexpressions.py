"""Removes repeated computations from a graph: of equal ones the first is kept.

An example is an attention mask that every block expands again.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from tomepass.graphs.constants import is_pure
from tomepass.graphs.nodes import MULTIPLIES

# In training they write running statistics, or draw, though their schemas do not say so.
_STATEFUL = ("batch_norm", "instance_norm", "lstm", "gru", "rnn")


def merge_duplicates(module: fx.GraphModule) -> None:
    """Lets readers of equal values read one of them, in place; each value keeps every bit.

    Left as they are: operators that draw random numbers or write; what is read from or made of
    memory that something writes to; results that leave the graph side by side, of which the user
    may change one; and products, whose count is the model's own.
    """
    written, leaving = _written(module.graph), _leaving(module.graph)
    first: dict[Any, fx.Node] = {}
    for node in list(module.graph.nodes):
        if not _repeatable(node) or not written.isdisjoint((node, *node.all_input_nodes)):
            continue
        found = first.setdefault(_key(node), node)
        both_leave = node in leaving and found in leaving
        if found is not node and not both_leave and _alike(found, node):
            node.replace_all_uses_with(found)
            module.graph.erase_node(node)
            if node in leaving:
                leaving.add(found)


def _repeatable(node: fx.Node) -> bool:
    """Does the operator give the same result from the same arguments, and may it run once?"""
    if node.op == "get_attr" or node.target is operator.getitem:
        return True
    if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool, int)):
        return is_pure(node) or getattr(node.target, "__module__", "") == "_operator"
    if not is_pure(node) or node.target in MULTIPLIES:
        return False
    return not any(kind in node.target._opname for kind in _STATEFUL)  # type: ignore[union-attr]


def _key(node: fx.Node) -> Any:
    return node.op, node.target, _told(node.args), _told(node.kwargs)


def _told(argument: Any) -> Any:
    """An argument to compare by: 1, 1.0 and True are three, and so are 0.0 and -0.0."""
    if isinstance(argument, fx.Node):
        return argument
    if isinstance(argument, (tuple, list)):
        return tuple(map(_told, argument))
    if isinstance(argument, dict):
        return tuple((name, _told(value)) for name, value in sorted(argument.items()))
    return type(argument), repr(argument)


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Is what is known of two values the same? Sizes that data decide are not known to be."""
    pairs = zip(*(pytree.tree_leaves(n.meta.get("val")) for n in (one, other)), strict=True)
    return all(_known_of(a) == _known_of(b) for a, b in pairs)


def _known_of(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    return f"{value.dtype} {value.device} {list(value.shape)} {value.requires_grad}"


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Every value whose memory an operator writes to, with all views of it."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        for target in _writes_to(node):
            found |= {node, *_same_memory(target)}
    return found


def _writes_to(node: fx.Node) -> Iterator[fx.Node]:
    for argument, value in _arguments(node):
        info = argument.alias_info
        if info is not None and info.is_write:
            yield from (v for v in pytree.tree_leaves(value) if isinstance(v, fx.Node))


def _leaving(graph: fx.Graph) -> set[fx.Node]:
    """What the user is given, and what it is a view of."""
    found: set[fx.Node] = set()
    for node in graph.output_node().all_input_nodes:
        found |= _same_memory(node)
    return found


def _same_memory(node: fx.Node) -> set[fx.Node]:
    """A value, what it is a view of, and all other views of that."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        if (node := waiting.pop()) in found:
            continue
        found.add(node)
        waiting += _shown(node)
        waiting += [user for user in node.users if node in _shown(user)]
    return found


def _shown(node: fx.Node) -> list[fx.Node]:
    """The operands whose memory a result shares, if only perhaps."""
    if node.target is operator.getitem:
        return node.all_input_nodes[:1]
    pairs = [value for argument, value in _arguments(node) if argument.alias_info is not None]
    return [v for v in pytree.tree_leaves(pairs) if isinstance(v, fx.Node)]


def _arguments(node: fx.Node) -> list[tuple[torch.Argument, Any]]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = node.target._schema.arguments
    by_name = {a.name: a for a in arguments}
    given = list(zip(arguments, node.args, strict=False))
    return given + [(by_name[name], v) for name, v in node.kwargs.items() if name in by_name]
