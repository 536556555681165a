"""What a graph computes from nothing but constants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from tomepass.graphs.nodes import is_pointwise
from tomepass.graphs.walks import answered

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
    return Constants(up_to_broadcast).value(node)


# In place of a value that depends on something.
_OPEN = object()


@dataclass
class Constants:
    """Values of one graph, each worked out once.

    Args:
        up_to_broadcast: as :func:`constant_value` takes it.
    """

    up_to_broadcast: bool = False
    values: dict[fx.Node, Any] = field(default_factory=dict)
    repeated: set[fx.Node] = field(default_factory=set)

    def value(self, node: fx.Node) -> Tensor | None:
        """What :func:`constant_value` answers."""
        with torch.no_grad():
            value = answered(node, self.values, self._needs, self._answer)
        return value if isinstance(value, Tensor) else None

    def _needs(self, node: fx.Node) -> list[fx.Node]:
        if not is_pure(node) or is_written(node):
            return []
        return node.all_input_nodes[:1] if self._repeats(node) else node.all_input_nodes

    def _repeats(self, node: fx.Node) -> bool:
        """Is it an expansion to sizes that are computed?"""
        sized = node.target is aten.expand.default and len(node.all_input_nodes) > 1
        return self.up_to_broadcast and sized

    def _answer(self, node: fx.Node) -> Any:
        if not is_pure(node) or is_written(node):
            return _OPEN
        first: Any = self.values[node.all_input_nodes[0]] if node.all_input_nodes else None
        if self._repeats(node):
            self.repeated.add(node)
            sizes = [size if isinstance(size, int) else 1 for size in node.meta["val"].shape]
            return _OPEN if first is _OPEN else first.expand(sizes)
        if any(operand in self.repeated for operand in node.all_input_nodes):
            if not (is_pointwise(node) or node.target in (*_BROADCASTS, _SLICE)):
                return _OPEN
            self.repeated.add(node)
            if node.target is _SLICE and not isinstance(_sliced_size(node), int):
                return first  # over the batch
        if any(self.values[operand] is _OPEN for operand in node.all_input_nodes):
            return _OPEN
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), self._argument)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return self.values[argument]
        # A model without values is still computed with where its constants are.
        return torch.device("cpu") if argument == torch.device("meta") else argument


def _sliced_size(node: fx.Node) -> Any:
    dim = node.args[1] if len(node.args) > 1 else 0
    return node.all_input_nodes[0].meta["val"].shape[dim]


def is_pure(node: fx.Node) -> bool:
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
    views = [node]
    for view in views:
        for user in view.users:
            schema = getattr(user.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                return True
            if schema is None or any(r.alias_info is not None for r in schema.returns):
                views.append(user)
    return False
