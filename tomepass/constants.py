"""What a graph computes from nothing but constants: attention masks that hide nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

# They repeat or re-view a mask without changing whether all of it is true.
_BROADCASTS = (aten.expand.default, aten.unsqueeze.default, aten.contiguous.default)


def hides_nothing(mask: fx.Node) -> bool:
    """Is an attention mask provably all true (or, if it is added, all zero) for every batch?

    Transformers materialises such a mask under ``torch.export``: arange, ge, expand.
    """
    while mask.target in _BROADCASTS:
        mask = mask.all_input_nodes[0]
    value = constant_value(mask)
    if value is None:
        return False
    return bool(value.all()) if value.dtype is torch.bool else not bool(value.any())


def constant_value(node: fx.Node) -> Tensor | None:
    """The node's value if it depends on no input, no parameter and no batch size, else None."""
    value = _evaluate(node, {})
    return value if isinstance(value, Tensor) else None


class _NotConstant(Exception):
    pass


def _evaluate(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    try:
        with torch.no_grad():
            return _value(node, known)
    except _NotConstant:
        return None


def _value(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if node not in known:
        if not _pure(node) or _written(node):
            raise _NotConstant
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda argument: _value(argument, known)
        )
        known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[node]


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


def _written(node: fx.Node) -> bool:
    """Does an operator write into the node's value, or into a view of it?"""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return True
        views = schema is None or any(r.alias_info is not None for r in schema.returns)
        if views and _written(user):
            return True
    return False
