"""What a graph computes from nothing but constants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tomepass.axis import is_pointwise

aten = torch.ops.aten

# They repeat, re-view or shorten a value without changing its elements.
_BROADCASTS = (aten.expand.default, aten.unsqueeze.default, aten.contiguous.default)
_SLICE = aten.slice.Tensor


def constant_value(node: fx.Node, *, up_to_broadcast: bool = False) -> Tensor | None:
    """The node's value if it depends on no input, no parameter and no batch size, else None.

    Args:
        up_to_broadcast: also where the value is repeated for a batch of any size: with size 1
            in place of each symbolic one.
    """
    value = _evaluate(node, _Known(up_to_broadcast))
    return value if isinstance(value, Tensor) else None


class _NotConstant(Exception):
    pass


@dataclass
class _Known:
    up_to_broadcast: bool
    values: dict[fx.Node, Any] = field(default_factory=dict)
    repeated: set[fx.Node] = field(default_factory=set)


def _evaluate(node: fx.Node, known: _Known) -> Any:
    try:
        with torch.no_grad():
            return _value(node, known)
    except _NotConstant:
        return None


def _value(node: fx.Node, known: _Known) -> Any:
    if node not in known.values:
        if not _pure(node) or is_written(node):
            raise _NotConstant
        if known.up_to_broadcast and (row := _row(node, known)) is not None:
            known.values[node] = row
            return row
        args, kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda argument: _argument(argument, known)
        )
        known.values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known.values[node]


def _argument(argument: Any, known: _Known) -> Any:
    if isinstance(argument, fx.Node):
        return _value(argument, known)
    # A model without values is still computed with where its constants are.
    return torch.device("cpu") if argument == torch.device("meta") else argument


def _row(node: fx.Node, known: _Known) -> Tensor | None:
    """What is repeated over a batch, if the operator as it stands cannot work it out."""
    operands = node.all_input_nodes
    if node.target is aten.expand.default and len(operands) > 1:
        known.repeated.add(node)
        sizes = [size if isinstance(size, int) else 1 for size in node.meta["val"].shape]
        row: Tensor = _value(operands[0], known).expand(sizes)
        return row
    for operand in operands:
        if _pure(operand):
            _value(operand, known)
    if not any(operand in known.repeated for operand in operands):
        return None
    if not (is_pointwise(node) or node.target in (*_BROADCASTS, _SLICE)):
        raise _NotConstant
    known.repeated.add(node)
    over_batch = node.target is _SLICE and not isinstance(_sliced_size(node), int)
    return _value(operands[0], known) if over_batch else None


def _sliced_size(node: fx.Node) -> Any:
    dim = node.args[1] if len(node.args) > 1 else 0
    return node.all_input_nodes[0].meta["val"].shape[dim]


def _pure(node: fx.Node) -> bool:
    """Does the operator give the same result each time, from its arguments alone?"""
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and not node.target._schema.is_mutable
        and node.target.namespace == "aten"
        and "empty" not in node.target._opname
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )


def is_written(node: fx.Node) -> bool:
    """Does an operator write into the node's value, or into a view of it?"""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return True
        views = schema is None or any(r.alias_info is not None for r in schema.returns)
        if views and is_written(user):
            return True
    return False
