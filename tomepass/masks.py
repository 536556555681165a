"""Attention masks and biases: which hide nothing, which only say where tokens stand."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from tomepass.attention import FUSED
from tomepass.axis import argument
from tomepass.constants import constant_value, is_written

if TYPE_CHECKING:
    from tomepass.capture import CanonicalGraph

aten = torch.ops.aten

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
        value = constant.item() if constant is not None and constant.numel() == 1 else None
    return isinstance(value, (int, float)) and -math.inf < value < _HIDING


def is_position_bias(bias: fx.Node, captured: CanonicalGraph) -> bool:
    """Is it made of learned parameters and finite constants alone, the same for every image?

    A mask is not: it is boolean, holds minus infinity, or comes from the input.
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
