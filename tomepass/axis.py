"""Where an axis goes: one transfer rule per kind of operator.

An axis is a factor of one dimension of a tensor: the dimension's size is
``before * length * after``, and both are 1 unless a view has folded axes together.
A rule answers with the axis of the result, or with the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten

Size = Any  # an int or a SymInt
Rule = Callable[[fx.Node, fx.Node, "Axis", Size], "Axis | str"]


@dataclass(frozen=True)
class Axis:
    """A factor of dimension ``dim``, with ``before`` and ``after`` folded around it."""

    dim: int
    before: Size = 1
    after: Size = 1

    @property
    def whole(self) -> bool:
        """Does the axis have its dimension to itself?"""
        return same(self.before, 1) and same(self.after, 1)


RULES: dict[object, Rule] = {}


def move(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    """The axis of ``node`` that ``axis`` of its argument ``operand`` becomes, or why none."""
    if (rule := RULES.get(node.target)) is not None:
        return rule(node, operand, axis, length)
    if is_pointwise(node):
        return _pointwise(node, operand, axis, length)
    return f"{target_name(node)} is not known to keep tokens apart"


def is_pointwise(node: fx.Node) -> bool:
    """Does every element of the result depend on the same element of the operands alone?"""
    return isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in node.target.tags
    )


def same(a: Size, b: Size) -> bool:
    """Are two sizes equal for every batch? Installs no guard."""
    return bool(statically_known_true(a == b))


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
    """``dim`` arguments as a tuple of non-negative ints; None means all."""
    if value is None:
        return tuple(range(ndim))
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(int(v) % ndim for v in values)


def rule(*targets: object) -> Callable[[Rule], Rule]:
    """Registers a rule for some operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


@rule(
    aten.dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.feature_dropout.default,
    aten.view_as.default,
    aten.expand_as.default,
    aten.zeros_like.default,
    aten.ones_like.default,
)
def _unchanged(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    if shape_of(node) != shape_of(operand) or operand is not node.args[0]:
        return f"{target_name(node)} changes the shape"
    return axis


def _pointwise(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    # Broadcasting aligns shapes at their ends.
    moved = Axis(axis.dim + len(shape_of(node)) - len(shape_of(operand)), axis.before, axis.after)
    if not same(shape_of(node)[moved.dim], shape_of(operand)[axis.dim]):
        return f"{target_name(node)} broadcasts the axis"
    return moved


@rule(aten.linear.default)
def _linear(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    if operand is not node.args[0] or axis.dim == len(shape_of(operand)) - 1:
        return "a linear layer mixes along the axis"
    return axis


@rule(aten.matmul.default, aten.bmm.default)
def _matmul(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    left, right = node.args[0], node.args[1]
    if left is right:
        return "a product of a tensor with itself"
    rows = len(shape_of(operand)) - (2 if operand is left else 1)
    contracted = len(shape_of(operand)) - (1 if operand is left else 2)
    if axis.dim == contracted:
        return "a matrix product sums over the axis"
    offset = len(shape_of(node)) - len(shape_of(operand))
    if axis.dim == rows or same(shape_of(node)[axis.dim + offset], shape_of(operand)[axis.dim]):
        return Axis(axis.dim + offset, axis.before, axis.after)
    return "a matrix product broadcasts the axis"


@rule(aten.layer_norm.default, aten.rms_norm.default)
def _normalised(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    trailing = len(node.args[1])  # type: ignore[arg-type]
    if operand is not node.args[0] or axis.dim >= len(shape_of(operand)) - trailing:
        return "a norm mixes along the axis"
    return axis


@rule(
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten.cumsum.default,
    aten.glu.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.slice.Tensor,
    aten.flip.default,
)
def _along_another(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    along = argument(node, 2, "dim", 0) if _dim_is_third(node) else argument(node, 1, "dim", 0)
    whole = node.target is aten.slice.Tensor and all(map(same, shape_of(node), shape_of(operand)))
    if axis.dim in dimensions(along, len(shape_of(operand))) and not whole:
        return f"{target_name(node)} works along the axis"
    return axis


@rule(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.linalg_vector_norm.default)
def _reduced(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    at = 2 if node.target is aten.linalg_vector_norm.default else 1
    reduced = dimensions(argument(node, at, "dim"), len(shape_of(operand)))
    if axis.dim in reduced:
        return f"{target_name(node)} sums over the axis"
    if len(shape_of(node)) == len(shape_of(operand)):
        return axis
    return Axis(axis.dim - sum(d < axis.dim for d in reduced), axis.before, axis.after)


@rule(aten.select.int, aten.unbind.int, aten.squeeze.dim, aten.squeeze.dims)
def _removed(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    if node.target is aten.unbind.int:
        along = argument(node, 1, "dim", 0)
    else:
        along = node.args[1]
    gone = dimensions(along, len(shape_of(operand)))
    if axis.dim in gone:
        return f"{target_name(node)} reads single positions of the axis"
    dropped = len(shape_of(operand)) - len(shape_of(node))
    if dropped == 0:
        return axis
    return Axis(axis.dim - sum(d < axis.dim for d in gone), axis.before, axis.after)


@rule(aten.unsqueeze.default)
def _inserted(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    (at,) = dimensions(node.args[1], len(shape_of(node)))
    return Axis(axis.dim + (at <= axis.dim), axis.before, axis.after)


@rule(aten.transpose.int, aten.permute.default, aten.t.default, aten.movedim.int)
def _permuted(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    order = list(range(len(shape_of(operand))))
    if node.target is aten.permute.default:
        order = list(dimensions(node.args[1], len(order)))
    elif node.target is aten.movedim.int:
        (a,), (b,) = dimensions(node.args[1], len(order)), dimensions(node.args[2], len(order))
        order.insert(b, order.pop(a))
    else:
        pair = (0, 1) if node.target is aten.t.default else node.args[1:3]
        a, b = dimensions(list(pair), len(order))
        order[a], order[b] = order[b], order[a]
    return Axis(order.index(axis.dim), axis.before, axis.after)


@rule(aten.expand.default)
def _expanded(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    return _pointwise(node, operand, axis, length)


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
def _viewed(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    """A view keeps the number of elements behind one step along the axis."""
    before, after = shape_of(operand), shape_of(node)
    step = prod(before[axis.dim + 1 :]) * axis.after
    found = None
    for dim, size in enumerate(after):
        inner = exact_quotient(step, prod(after[dim + 1 :]))
        outer = None if inner is None else exact_quotient(size, inner * length)
        if outer is None:
            continue
        moved = Axis(dim, outer, inner)
        if moved.whole:
            return moved
        found = found or moved
    return found or f"{target_name(node)} splits the axis: {_show(before)} to {_show(after)}"


@rule(aten.cat.default, aten.stack.default)
def _joined(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    (along,) = dimensions(argument(node, 1, "dim", 0), len(shape_of(node)))
    if node.target is aten.stack.default:
        return Axis(axis.dim + (along <= axis.dim), axis.before, axis.after)
    return "a cat extends the axis" if axis.dim == along else axis


def _dim_is_third(node: fx.Node) -> bool:
    return node.target in (
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.chunk.default,
    )


def _show(shape: tuple[Size, ...]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"
