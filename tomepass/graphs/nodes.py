"""Questions about a node: its shape, its arguments, what kind of operator it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

aten = torch.ops.aten


FUSED = aten.scaled_dot_product_attention.default

PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)

Size = Any  # an int or a SymInt

# Pointwise, though no tag says so.
_COMPOSITES = (aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)


def is_pointwise(node: fx.Node) -> bool:
    """Does every element of the result depend on the same element of the operands alone?"""
    return node.target in _COMPOSITES or (
        isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    )


def same(a: Size, b: Size) -> bool:
    """Are two sizes equal for every batch? Installs no guard."""
    return bool(statically_known_true(a == b))


def is_known(size: Size) -> bool:
    """Is a size known before the model runs: a number, or one that follows from the batch?"""
    return isinstance(size, int) or not free_unbacked_symbols(size)


def exact_quotient(a: Size, b: Size) -> Size | None:
    """``a / b`` if ``b`` divides ``a`` for every batch, else None."""
    if same(b, 0):
        return None
    quotient = a // b
    return quotient if same(quotient * b, a) else None


def shape_of(node: fx.Node) -> tuple[Size, ...]:
    """The shape of a node's value; of the first one where there are several."""
    value = node.meta["val"]
    if isinstance(value, (tuple, list)):
        value = value[0]
    return tuple(value.shape)


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Do two nodes have the same shape for every batch?"""
    left, right = shape_of(a), shape_of(b)
    return len(left) == len(right) and all(map(same, left, right))


def target_name(node: fx.Node) -> str:
    """The operator as one reads it: ``aten.roll``."""
    target = node.target
    return str(getattr(target, "_overloadpacket", getattr(target, "__name__", target)))


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument, given by position or by name."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def dimensions(value: Any, ndim: int) -> tuple[int, ...]:
    """``dim`` arguments as a tuple of non-negative ints; None or an empty list means all."""
    if value is None or value == []:
        return tuple(range(ndim))
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(int(v) % ndim for v in values)


MULTIPLIES = (
    *(*PRODUCTS, FUSED, aten.linear.default, aten.mm.default, aten.mv.default),
    *(aten.addmm.default, aten._int_mm.default),
)


def is_tensor(node: fx.Node) -> bool:
    """Does the node hold a tensor, or several?"""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return any(isinstance(v, Tensor) for v in value)
    return isinstance(value, Tensor)
