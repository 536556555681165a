"""Classifies what is added to attention scores: position biases, padding masks and other masks.

A learned position bias and a padding mask have exact counterparts on merged tokens; other masks
mostly have none. A mask that hides nothing can be left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from tomepass.capture.idle_masks import hides_nothing
from tomepass.graphs.constants import Constants, constant_value, is_written
from tomepass.graphs.nodes import (
    MULTIPLIES,
    dimensions,
    is_pointwise,
    same,
    shape_of,
)
from tomepass.graphs.walks import answered
from tomepass.reading.attention import SOFTMAXES

if TYPE_CHECKING:
    from tomepass.graphs.canonical import CanonicalGraph


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


# Through these 0 and 1 stay what they are, or are exchanged: 1 - mask.
_KEEP_MASKS = (
    *(aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten.slice.Tensor),
    *(aten.rsub.Scalar, aten.sub.Tensor, aten.clone.default, aten._to_copy.default),
    *(aten.type_as.default, aten.mul.Tensor, aten.permute.default, aten.transpose.int),
    *(aten.alias.default, aten.detach.default, aten.squeeze.dim, aten.flatten.using_ints),
)


_WHERE = (aten.where.self, aten.where.ScalarOther)

# Below this a bias is there to hide something.
_HIDING = -1e4


# A key whose score lies this far below another's weighs less than its 22,000th part: hidden.
_WIDE = 10.0


_WHERES = (*_WHERE, aten.where.ScalarSelf, aten.where.Scalar)

# They put one value in the place of another.
_CHOICES = (
    *(*_WHERES, aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    *(aten.pad.default, aten.constant_pad_nd.default),
)


# What their operands say is in the result as it stands, as in sums and choices; through any other
# pointwise operator, and through a product, it arrives scaled by what was learned.
_SUMS = (
    *(aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.maximum.default),
    *(aten.minimum.default, aten.clamp.default),
)


def hides_all(value: Any) -> bool:
    """Is an operand one finite number so low that a key with this score gets no attention?"""
    if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor):
        constant = constant_value(value, up_to_broadcast=True)
        value = None if constant is None else _only_value(constant)
    return isinstance(value, (int, float)) and -math.inf < value < _HIDING


def _only_value(constant: Tensor) -> float | None:
    first = constant.flatten()[:1]
    return first.item() if len(first) and bool((constant == first).all()) else None


def is_position_bias(bias: fx.Node, captured: CanonicalGraph) -> bool:
    """Is a bias computed from learned parameters and constants alone, the same for every image?

    A mask is not one: it is boolean, it hides keys (by minus infinity, or by a value so far below
    the others that next to no weight is left), or it comes from the input. Nor is a bias that a
    constant mask was written into or added to. The values of parameters are not looked at, since
    training changes them.
    """
    if not bias.meta["val"].is_floating_point():
        return False
    constants = Constants(up_to_broadcast=True)
    constant = _known(bias, captured, constants)
    if constant is not None and not isinstance(constant, nn.Parameter):
        rows = constant if constant.ndim else constant[None]
        return _finite(constant) and _width(rows.amax(-1), rows.amin(-1)) <= _WIDE
    seen: set[tuple[fx.Node, bool]] = set()
    # With each value, whether it is part of the bias as it stands.
    frontier = [(bias, True)]
    while frontier:
        node, plain = place = frontier.pop()
        value = node.meta.get("val")
        if place in seen or not isinstance(value, Tensor):
            continue
        seen.add(place)
        if node.op == "placeholder":
            index = not (value.is_floating_point() or value.dtype is torch.bool)
            if node.name in captured.data or not (index or node.name in captured.learned):
                return False
        elif (constant := _known(node, captured, constants)) is not None:
            learned = isinstance(constant, nn.Parameter)  # Inductor's freezing makes constants
            if not _finite(constant) or (plain and not learned and _is_wide(constant)):
                return False
        elif value.is_floating_point() and is_written(node):
            return False  # what was written is not among its operands
        elif node.target in _WHERE and hides_nothing(node.args[0]):  # type: ignore[arg-type]
            frontier.append((node.args[1], plain))  # type: ignore[arg-type]
        elif value.is_floating_point() and _puts_in(node, plain):
            return False
        else:
            inner = plain and value.is_floating_point() and not _scales(node)
            frontier += [(operand, inner) for operand in node.all_input_nodes]
    return True


def bias_factor(added: fx.Node, bias: fx.Node) -> float | None:
    """The factor with which a bias that is added to scores, or subtracted, enters the softmax.

    It is -1 for one that is subtracted, times the constants by which scores are multiplied between
    the sum and the softmax. None where the sum's own factor is not a constant.
    """
    alpha = added.kwargs.get("alpha", 1)
    if not isinstance(alpha, (int, float)) or added.args.count(bias) != 1:
        return None
    factor = float(alpha) if added.args[1] is bias else 1.0
    if added.target is aten.sub.Tensor and added.args[1] is bias:
        factor = -factor
    node = added
    while node.target not in SOFTMAXES and len(node.users) == 1:
        (reader,) = node.users
        factor, node = factor * _scaled_by(reader, node), reader
    return factor or None


def _scaled_by(reader: fx.Node, scores: fx.Node) -> float:
    """The constant by which an operator multiplies scores; 1 if there is none."""
    if len(reader.args) < 2 or scores not in reader.args[:2]:
        return 1.0
    other = reader.args[1] if reader.args[0] is scores else reader.args[0]
    if reader.target is aten.sub.Tensor and other is reader.args[0]:
        return -1.0
    if isinstance(other, fx.Node):
        constant = constant_value(other, up_to_broadcast=True)
        other = None if constant is None else _only_value(constant)
    if not isinstance(other, (int, float)) or not other:
        return 1.0
    if reader.target is aten.mul.Tensor:
        return float(other)
    return 1 / other if reader.target is aten.div.Tensor and reader.args[0] is scores else 1.0


def _puts_in(node: fx.Node, plain: bool) -> bool:
    """Does an operator have a constant argument so low, or so wide, that it serves to hide keys?"""
    given = (*node.args, *node.kwargs.values())
    numbers = [n for n in given if isinstance(n, (int, float)) and not isinstance(n, bool)]
    if plain and node.target in _CHOICES and any(abs(n) > _WIDE for n in numbers):
        return True
    return any(isinstance(n, float) and not _HIDING < n < torch.inf for n in numbers)


def _scales(node: fx.Node) -> bool:
    """Does an operator scale its operands, by a parameter or by a nonlinear function?"""
    if node.target in MULTIPLIES:
        return True
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return len(node.all_input_nodes) > 1
    return is_pointwise(node) and node.target not in (*_SUMS, *_CHOICES)


def _is_wide(value: Tensor) -> bool:
    """Do constants differ so much from 0, where learned values are, that a softmax hides one?

    A single number can be judged by nothing else. A row that is the same everywhere changes no
    attention weight.
    """
    if not value.is_floating_point() or not value.numel():
        return False
    return _width(value.amax().clamp(min=0), value.amin().clamp(max=0)) > _WIDE


def _width(largest: Tensor, smallest: Tensor) -> float:
    return float((largest.double() - smallest.double()).amax()) if largest.numel() else 0.0


def _known(node: fx.Node, captured: CanonicalGraph, constants: Constants) -> Tensor | None:
    if node.op == "get_attr":
        held = getattr(captured.module, str(node.target), None)
        return held if isinstance(held, Tensor) else None
    return constants.value(node)


def _finite(value: Tensor) -> bool:
    if not value.is_floating_point():
        return True
    return bool((value.isfinite() & (value > _HIDING)).all())


def is_padding(mask: fx.Node, ndim: int = 4) -> bool:
    """Does a boolean mask ``[B, 1, N, N]`` hide the same keys from every query and head?

    Args:
        ndim: dimensions of the attention: 3 if it has no heads, and neither has the mask.
    """
    value = mask.meta["val"]
    if value.dtype is not torch.bool or value.ndim != ndim or ndim not in (3, 4):
        return False
    varying = _Varying()
    return not any(varying.along(mask, dim) for dim in range(1, ndim - 1))


@dataclass
class _Varying:
    """Along which dimensions the values of a graph may differ."""

    constants: Constants = field(default_factory=lambda: Constants(up_to_broadcast=True))
    known: dict[tuple[fx.Node, int], bool] = field(default_factory=dict)

    def along(self, node: fx.Node, dim: int) -> bool:
        """May the value differ along a dimension? False only where it provably does not."""
        return answered((node, dim), self.known, self._needs, self._answer)

    def _needs(self, place: tuple[fx.Node, int]) -> list[tuple[fx.Node, int]]:
        told = self._told(*place)
        return told if isinstance(told, list) else []

    def _answer(self, place: tuple[fx.Node, int]) -> bool:
        told = self._told(*place)
        return told if isinstance(told, bool) else any(self.known[other] for other in told)

    def _told(self, node: fx.Node, dim: int) -> bool | list[tuple[fx.Node, int]]:
        """Whether a value differs, or where among its operands that is to be seen."""
        shape = shape_of(node)
        if dim < 0 or same(shape[dim], 1):
            return False
        behind = len(shape) - dim
        if (constant := self.constants.value(node)) is not None:
            return not bool((constant == constant.narrow(-behind, 0, 1)).all())
        operands = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]
        if node.target is aten.index.Tensor:
            indexed, operands = operands[0], operands[1:]
            # All dimensions indexed: the result is laid out as the indices are.
            if len(operands) != len(shape_of(indexed)):
                return True
        elif node.target is aten.unsqueeze.default:
            (at,) = dimensions(node.args[1], len(shape))
            return [(operands[0], dim - (at < dim))]
        elif not (is_pointwise(node) or node.target in _ELEMENTWISE) or not operands:
            return True
        return [(a, len(shape_of(a)) - behind) for a in operands]


def comes_from_a_mask(factor: fx.Node) -> bool:
    """Is what multiplies tokens 0 and 1, or made of that: a boolean tensor, or integers, as floats?

    A rotary table is not, though it may be looked up by integers.
    """
    seen: set[fx.Node] = set()
    waiting = [factor]
    while waiting:
        node = waiting.pop()
        value = node.meta.get("val")
        if node in seen or not isinstance(value, Tensor):
            continue
        seen.add(node)
        if not value.is_floating_point():
            return True
        if node.target in _WHERES:
            # A choice between two numbers is a mask, one between values is not.
            numbers = [a for a in node.args[1:] if _is_number(a)]
            if len(numbers) == 2:
                return True
        elif node.target in _ELEMENTWISE or node.target in _KEEP_MASKS:
            waiting += node.all_input_nodes
    return False


def _is_number(value: Any) -> bool:
    if not isinstance(value, fx.Node):
        return isinstance(value, (int, float))
    constant = constant_value(value, up_to_broadcast=True)
    return constant is not None and _only_value(constant) is not None
