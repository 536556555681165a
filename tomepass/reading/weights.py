"""Where an attention's softmax runs and where its heads are.

Tells whether a softmax yields attention weights over the tokens, which dimension of keys and masks
is that of the heads, and which operators between the weights and the values leave the result
proportional to the weights.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import fx

from tomepass.graphs.nodes import (
    PRODUCTS,
    Size,
    argument,
    dimensions,
    same,
    shape_of,
)
from tomepass.reading.attention import VIEWS, ignores_first
from tomepass.reading.axis import Axis
from tomepass.reading.layouts import (
    Layout,
    Outcome,
    Positional,
    Weighed,
)

aten = torch.ops.aten


SPLITS = (
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)


SCALINGS = (aten.mul.Tensor, aten.div.Tensor)

# What else gives twice the result for twice the attention weights, along other dimensions.
_HOMOGENEOUS = frozenset(
    {
        *VIEWS,
        *PRODUCTS,
        aten.mm.default,
        aten.neg.default,
        aten.squeeze.default,
        aten.squeeze.dims,
        aten.movedim.int,
        aten.movedim.intlist,
        aten.swapaxes.default,
        aten.swapdims.default,
        aten.t.default,
        aten.mT.default,
        aten.numpy_T.default,
        aten.expand_as.default,
        aten.view_as.default,
        aten.reshape_as.default,
        aten.alias.default,
        aten.repeat.default,
        aten.repeat_interleave.self_int,
        aten.to.device,
        aten.to.dtype_layout,
        aten.slice.Tensor,
        aten.select.int,
        aten.unbind.int,
        aten.narrow.default,
        aten.index_select.default,
        aten.flip.default,
        aten.roll.default,
        aten.cat.default,
        aten.stack.default,
        *SPLITS,
        aten.sum.dim_IntList,
        aten.mean.dim,
        aten.amax.default,
        aten.amin.default,
    }
)


def heads_apart(node: fx.Node, key: Layout) -> bool:
    """Are the keys of a fused attention ``[B, H, N, D]``, or that with other heads, or none?

    ``[B, N, D]``, ``[B H, N, D]``, ``[B, G, H, N, D]``: what stands before N and is not the batch
    are heads, the same ones for queries, keys and values.
    """
    shapes = [shape_of(operand) for operand in node.args[:3]]  # type: ignore[arg-type]
    ndim, batch = len(shapes[1]), key.batch
    if key.columns is not None or key.weights or key.tokens != Axis(ndim - 2):
        return False
    if batch.dim != 0 or not same(batch.before, 1) or not isinstance(batch.after, int):
        return False
    if ndim == 4 and batch.after == 1:
        return True
    heads = [shape[1:-2] for shape in shapes]
    if not all(isinstance(count, int) for count in heads[1]):
        return False
    return all(
        len(shape) == ndim and all(map(same, other, heads[0]))
        for shape, other in zip(shapes, heads, strict=True)
    )


def fused_heads(shape: tuple[Size, ...], key: Layout) -> int | None:
    """How many heads the keys of a fused attention have that are not ``[B, H, N, D]``."""
    folded: int = key.batch.after
    if len(shape) == 4 and folded == 1:
        return None
    return folded * prod(int(heads) for heads in shape[1:-2])


def is_of_heads(mask: fx.Node, attention: fx.Node) -> bool:
    """Does a mask stand beside the scores as ``[B, H, N, N]``, or is it one for all heads?"""
    before = shape_of(mask)[:-2]
    alike = all(same(size, 1) for size in before)
    return len(before) <= 2 and (alike or len(shape_of(attention)) == 4)


def softmax(node: fx.Node, layout: Layout) -> Outcome | None:
    """A softmax over the keys. None for one along a dimension that holds no tokens."""
    holder = node.args[0]
    (along,) = dimensions(node.args[1], len(shape_of(holder)))  # type: ignore[arg-type]
    if along not in [axis.dim for axis in layout.axes]:
        return None
    batch = layout.batch
    if along != layout.keys.dim or not layout.keys.whole or layout.weights:
        return Positional("a softmax over something else than the keys of an attention")
    if batch.dim != 0 or not same(batch.before, 1) or not isinstance(batch.after, int):
        return Positional("a softmax over tokens that are not batch first")
    return Weighed(replace(layout, weights=True))


def homogeneous(node: fx.Node, weights: fx.Node) -> bool:
    """Do twice the attention weights give twice the result?"""
    if node.target is aten.linear.default:
        return argument(node, 2, "bias") is None
    if node.target is aten.baddbmm.default:
        return ignores_first(node)
    if node.target in SCALINGS:
        above = node.target is aten.mul.Tensor or node.args[0] is weights
        return above and node.args.count(weights) == 1
    return node.target in _HOMOGENEOUS and _is_float(node)


def _is_float(node: fx.Node) -> bool:
    value = node.meta["val"]
    first = value[0] if isinstance(value, (tuple, list)) else value
    return bool(first.is_floating_point())
