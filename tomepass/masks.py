"""Attention masks and biases: which hide nothing, which only say where tokens stand."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from tomepass.attention import FUSED
from tomepass.axis import argument, dimensions, is_pointwise, same, shape_of
from tomepass.constants import constant_value, is_written

if TYPE_CHECKING:
    from tomepass.capture import CanonicalGraph

aten = torch.ops.aten

# Elementwise, though no tag says so.
_ELEMENTWISE = (
    aten.expand.default,
    aten.contiguous.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
)
_WHERE = (aten.where.self, aten.where.ScalarOther)
# Below this a bias is there to hide something.
_HIDING = -1e4


def hides_nothing(mask: fx.Node) -> bool:
    """Is an attention mask provably all true (or, if it is added, all zero) for every batch?

    Transformers materialises such a mask under ``torch.export``: arange, ge, expand.
    """
    value = constant_value(mask, up_to_broadcast=True)
    if value is None:
        return False
    return bool(value.all()) if value.dtype is torch.bool else not bool(value.any())


def hides_all(value: Any) -> bool:
    """Is an operand one number, finite, that hides whatever score it replaces?"""
    if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor):
        constant = constant_value(value, up_to_broadcast=True)
        value = None if constant is None else _only_value(constant)
    return isinstance(value, (int, float)) and -math.inf < value < _HIDING


def _only_value(constant: Tensor) -> float | None:
    first = constant.flatten()[:1]
    return first.item() if len(first) and bool((constant == first).all()) else None


def is_position_bias(bias: fx.Node, captured: CanonicalGraph) -> bool:
    """Is it made of learned parameters and finite constants alone, the same for every image?

    A mask is not: it is boolean, holds minus infinity, or comes from the input. Nor is a bias that
    some constant mask has filled with minus infinity.
    """
    if not bias.meta["val"].is_floating_point():
        return False
    seen: set[fx.Node] = set()
    frontier = [bias]
    while frontier:
        node = frontier.pop()
        value = node.meta.get("val")
        if node in seen or not isinstance(value, Tensor):
            continue
        seen.add(node)
        if node.op == "placeholder":
            index = not (value.is_floating_point() or value.dtype is torch.bool)
            if node.name in captured.data or not (index or node.name in captured.learned):
                return False
        elif (constant := _known(node, captured)) is not None:
            if not _finite(constant):
                return False
        elif value.is_floating_point() and is_written(node):
            return False  # what was written is not among its operands
        elif node.target in _WHERE and hides_nothing(node.args[0]):  # type: ignore[arg-type]
            frontier.append(node.args[1])  # type: ignore[arg-type]
        elif value.is_floating_point() and any(map(_hides, (*node.args, *node.kwargs.values()))):
            return False
        else:
            frontier += node.all_input_nodes
    return True


def _known(node: fx.Node, captured: CanonicalGraph) -> Tensor | None:
    if node.op == "get_attr":
        held = getattr(captured.module, str(node.target), None)
        return held if isinstance(held, Tensor) else None
    return constant_value(node, up_to_broadcast=True)


def _finite(value: Tensor) -> bool:
    if not value.is_floating_point():
        return True
    return bool((value.isfinite() & (value > _HIDING)).all())


def _hides(argument: object) -> bool:
    return isinstance(argument, float) and not _HIDING < argument < torch.inf


def is_padding(mask: fx.Node) -> bool:
    """Does a boolean mask ``[B, 1, N, N]`` hide the same keys from every query and head?"""
    value = mask.meta["val"]
    if value.dtype is not torch.bool or value.ndim != 4:
        return False
    return not (_varies(mask, 1) or _varies(mask, 2))


def _varies(node: fx.Node, dim: int) -> bool:
    """May the value differ along a dimension? False only where it provably does not."""
    shape = shape_of(node)
    if dim < 0 or same(shape[dim], 1):
        return False
    behind = len(shape) - dim
    if (constant := constant_value(node, up_to_broadcast=True)) is not None:
        return not bool((constant == constant.narrow(-behind, 0, 1)).all())
    operands = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]
    if node.target is aten.index.Tensor:
        indexed, operands = operands[0], operands[1:]
        # All dimensions indexed: the result is laid out as the indices are.
        if len(operands) != len(shape_of(indexed)):
            return True
    elif node.target is aten.unsqueeze.default:
        (at,) = dimensions(node.args[1], len(shape))
        return _varies(operands[0], dim - (at < dim))
    elif not (is_pointwise(node) or node.target in _ELEMENTWISE):
        return True
    return any(_varies(a, len(shape_of(a)) - behind) for a in operands)


def drop_idle_masks(module: fx.GraphModule) -> None:
    """Leaves out boolean masks that are all true and are *added* to an attention's bias.

    Transformers makes them under ``torch.export`` alone. They raise all scores of a row alike,
    which no softmax sees but for its rounding.
    """
    for node in list(module.graph.nodes):
        if node.target is not aten.add.Tensor:
            continue
        for bias, mask in (node.args[:2], node.args[1::-1]):
            if (
                isinstance(mask, fx.Node)
                and mask.meta["val"].dtype is torch.bool
                and hides_nothing(mask)
                and all(_is_mask_of(user, node) for user in node.users)
            ):
                node.replace_all_uses_with(bias)
                module.graph.erase_node(node)
                break


def _is_mask_of(attention: fx.Node, mask: fx.Node) -> bool:
    return attention.target is FUSED and argument(attention, 3, "attn_mask") is mask
