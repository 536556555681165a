"""Follows one dimension of a tensor, such as the one that counts tokens, through an operator.

Each kind of operator has a rule: given the axis in an operand, it returns the axis in the result,
or the reason why there is none. An axis can be folded into a dimension together with others, as
after ``view(B * N, C)``: the size of that dimension is then ``before * length * after``. Without
folding ``before`` and ``after`` are 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from tomepass.graphs.nodes import (
    Size,
    argument,
    dimensions,
    exact_quotient,
    is_pointwise,
    same,
    same_shape,
    shape_of,
    target_name,
)

aten = torch.ops.aten

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
    rule = RULES.get(node.target) or _NAMED.get(getattr(node.target, "__name__", ""))
    if rule is not None:
        return rule(node, operand, axis, length)
    if is_pointwise(node):
        return _pointwise(node, operand, axis, length)
    return f"{target_name(node)} is not known to keep tokens apart"


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
    aten.zeros_like.default,
    aten.ones_like.default,
)
def _unchanged(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    # A second operand of the same shape gives its dtype alone.
    if not same_shape(node, operand):
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
    if not _read_once(node, operand) or axis.dim == len(shape_of(operand)) - 1:
        return "a linear layer mixes along the axis"
    return axis


@rule(aten.addmm.default)
def _affine(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    if node.args.count(operand) > 1 or operand is not node.args[1] or axis.dim != 0:
        return "an affine map mixes along the axis"
    return axis


def sums_over(node: fx.Node, operand: fx.Node, axis: Axis) -> bool:
    """Does a product of two tensors sum over an axis of one of them?"""
    return axis.dim == summed_dimension(node, operand)


def summed_dimension(node: fx.Node, operand: fx.Node) -> int | None:
    """The dimension of ``operand`` that a product sums over; None if there are several."""
    if node.target is aten.einsum.default:
        equation = str(node.args[0]).replace(" ", "")
        terms, _, result = equation.partition("->")
        term = terms.split(",")[list(node.args[1]).index(operand)]  # type: ignore[arg-type]
        gone = [i for i, letter in enumerate(term) if letter not in result]
        return gone[0] if len(gone) == 1 else None
    ndim = len(shape_of(operand))
    first = node.args[1] if node.target is aten.baddbmm.default else node.args[0]
    return ndim - 1 if operand is first or ndim == 1 else ndim - 2


@rule(aten.baddbmm.default)
def _biased_matmul(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    if node.args.count(operand) > 1 or operand is node.args[0]:
        return "a product is added to tokens"
    if axis.dim == summed_dimension(node, operand):
        return "a matrix product sums over the axis"
    return axis


@rule(
    aten.matmul.default,
    aten.bmm.default,
    aten.mm.default,
    aten.mv.default,
    aten._int_mm.default,
)
def _matmul(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    left, right = node.args[:2]
    if left is right:
        return "a product of a tensor with itself"
    ndim = len(shape_of(operand))
    contracted = summed_dimension(node, operand)
    assert contracted is not None
    if axis.dim == contracted:
        return "a matrix product sums over the axis"
    offset = len(shape_of(node)) - ndim
    # A product with a vector drops the dimension it sums over.
    dim = axis.dim - (axis.dim > contracted) if offset < 0 else axis.dim + offset
    if not same(shape_of(node)[dim], shape_of(operand)[axis.dim]):
        return "a matrix product broadcasts the axis"
    return Axis(dim, axis.before, axis.after)


@rule(aten.einsum.default)
def _einsum(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    if "->" not in equation or "." in equation or operands.count(operand) > 1:
        return "expected an einsum of different tensors, with an explicit result and no ellipsis"
    terms, result = equation.split("->")
    term = terms.split(",")[operands.index(operand)]
    letter = term[axis.dim]
    if letter not in result or term.count(letter) > 1:
        return "an einsum sums over the axis"
    if not same(shape_of(node)[result.index(letter)], shape_of(operand)[axis.dim]):
        return "an einsum broadcasts the axis"
    return Axis(result.index(letter), axis.before, axis.after)


@rule(
    aten.layer_norm.default,
    aten.native_layer_norm.default,
    aten.rms_norm.default,
    aten._fused_rms_norm.default,
)
def _normalised(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    trailing = len(node.args[1])  # type: ignore[arg-type]
    if not _read_once(node, operand) or axis.dim >= len(shape_of(operand)) - trailing:
        return "a norm mixes along the axis"
    return axis


def _in_groups(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    groups: list[int] = node.args[2 if _CHOOSES in str(node.target) else 1]  # type: ignore[assignment]
    if len(groups) != len(shape_of(operand)) or groups[axis.dim] != 1:
        return f"{target_name(node)} has one scale for several tokens"
    return axis


# Quantisation of each token by itself. The operators are there once torchao is imported.
_CHOOSES = "torchao.choose_qparams_affine"


_NAMED: dict[str, Rule] = dict.fromkeys(
    ("choose_qparams_affine.default", "quantize_affine.default", "dequantize_affine.default"),
    _in_groups,
)


# Where each of these names the dimension it works along, and which one if it does not.
_ALONG: dict[object, tuple[int, int | None]] = {
    aten.softmax.int: (1, None),
    aten._softmax.default: (1, None),
    aten._safe_softmax.default: (1, None),
    aten.log_softmax.int: (1, None),
    aten.cumsum.default: (1, None),
    aten.glu.default: (1, -1),
    aten.flip.default: (1, None),
    aten.roll.default: (2, None),
    aten.slice.Tensor: (1, 0),
    aten.narrow.default: (1, None),
    aten.index_select.default: (1, None),
    aten.split.Tensor: (2, 0),
    aten.split.sizes: (2, 0),
    aten.split_with_sizes.default: (2, 0),
    aten.chunk.default: (2, 0),
    aten.tensor_split.sections: (2, 0),
    aten.tensor_split.indices: (2, 0),
    aten.repeat_interleave.self_int: (2, None),
}


@rule(*_ALONG)
def _along_another(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    index, default = _ALONG[node.target]
    along = argument(node, index, "dim", default)
    whole = node.target is aten.slice.Tensor and same_shape(node, operand)
    if not _read_once(node, operand):
        return f"{target_name(node)} takes the tokens for positions"
    if axis.dim in dimensions(along, len(shape_of(operand))) and not whole:
        return f"{target_name(node)} works along the axis"
    return axis


# Where each of these names the dimensions it reduces; none, or none given, means all.
_REDUCED: dict[object, int] = {
    aten.mean.dim: 1,
    aten.sum.dim_IntList: 1,
    aten.prod.dim_int: 1,
    aten.amax.default: 1,
    aten.amin.default: 1,
    aten.max.dim: 1,
    aten.min.dim: 1,
    aten.argmax.default: 1,
    aten.argmin.default: 1,
    aten.all.dim: 1,
    aten.any.dim: 1,
    aten.logsumexp.default: 1,
    aten.var.dim: 1,
    aten.var.correction: 1,
    aten.std.dim: 1,
    aten.std.correction: 1,
    aten.var_mean.dim: 1,
    aten.var_mean.correction: 1,
    aten.linalg_vector_norm.default: 2,
    aten.norm.ScalarOpt_dim: 2,
}


@rule(*_REDUCED)
def _reduced(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    reduced = dimensions(argument(node, _REDUCED[node.target], "dim"), len(shape_of(operand)))
    if axis.dim in reduced:
        return f"{target_name(node)} sums over the axis"
    if len(shape_of(node)) == len(shape_of(operand)):
        return axis
    return Axis(axis.dim - sum(d < axis.dim for d in reduced), axis.before, axis.after)


@rule(aten.select.int, aten.unbind.int)
def _removed(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    (gone,) = dimensions(argument(node, 1, "dim", 0), len(shape_of(operand)))
    if axis.dim == gone:
        return f"{target_name(node)} reads single positions of the axis"
    return Axis(axis.dim - (gone < axis.dim), axis.before, axis.after)


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeezed(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    shape = shape_of(operand)
    asked = dimensions(argument(node, 1, "dim"), len(shape))
    gone = [d for d in asked if same(shape[d], 1)]
    if axis.dim in gone or len(gone) != len(shape) - len(shape_of(node)):
        return f"{target_name(node)} removes the axis"
    return Axis(axis.dim - sum(d < axis.dim for d in gone), axis.before, axis.after)


@rule(aten.unsqueeze.default)
def _inserted(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    (at,) = dimensions(node.args[1], len(shape_of(node)))
    return Axis(axis.dim + (at <= axis.dim), axis.before, axis.after)


@rule(aten.permute.default, aten.numpy_T.default)
def _permuted(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    ndim = len(shape_of(operand))
    reverse = range(ndim - 1, -1, -1)
    order = dimensions(argument(node, 1, "dims", list(reverse)), ndim)
    return Axis(order.index(axis.dim), axis.before, axis.after)


@rule(
    aten.transpose.int,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.t.default,
    aten.mT.default,
    aten.adjoint.default,
)
def _transposed(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    ndim = len(shape_of(operand))
    pair = node.args[1:3] or (max(ndim - 2, 0), ndim - 1)
    a, b = dimensions(list(pair), ndim)
    return Axis({a: b, b: a}.get(axis.dim, axis.dim), axis.before, axis.after)


@rule(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist)
def _dim_moved(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    ndim = len(shape_of(operand))
    moved = dict(zip(*(dimensions(node.args[i], ndim) for i in (1, 2)), strict=True))
    # The others fill the places left, in their order.
    places = [d for d in range(ndim) if d not in moved.values()]
    moved.update(zip((d for d in range(ndim) if d not in moved), places, strict=True))
    return Axis(moved[axis.dim], axis.before, axis.after)


@rule(aten.expand.default, aten.expand_as.default)
def _expanded(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    return _pointwise(node, operand, axis, length)


@rule(aten.repeat.default, aten.tile.default)
def _repeated(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    # New dimensions come first, as in broadcasting; a repeated axis changes its size.
    return _pointwise(node, operand, axis, length)


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.ravel.default,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape_as.default,
)
def _viewed(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    """A view keeps the number of elements behind one step along the axis."""
    if same_shape(node, operand):
        return axis
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


@rule(aten.cat.default, aten.concat.default, aten.concatenate.default, aten.stack.default)
def _joined(node: fx.Node, operand: fx.Node, axis: Axis, length: Size) -> Axis | str:
    (along,) = dimensions(argument(node, 1, "dim", 0), len(shape_of(node)))
    if node.target is aten.stack.default:
        return Axis(axis.dim + (along <= axis.dim), axis.before, axis.after)
    return "a cat extends the axis" if axis.dim == along else axis


def _read_once(node: fx.Node, operand: fx.Node) -> bool:
    """Is the operand the first argument, and no other?"""
    return operand is node.args[0] and operand not in node.args[1:]


def _show(shape: tuple[Size, ...]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"
