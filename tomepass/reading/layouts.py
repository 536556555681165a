"""The results of following the tokens of a stream through a graph (see ``tokens.py``).

A :class:`Layout` says which dimensions of a tensor count images and tokens. The other classes are
the outcomes for one operator that reads tokens: for example :class:`Carried`, where the result
holds the same tokens, :class:`Attended`, an attention over them, and :class:`Positional`, where
the operator depends on where each token stands, so that tokens have to be unmerged before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from tomepass.graphs.nodes import (
    Size,
    dimensions,
    is_pointwise,
    same,
    shape_of,
)
from tomepass.reading.attention import ignores_first
from tomepass.reading.axis import Axis

aten = torch.ops.aten


@dataclass(frozen=True)
class Layout:
    """Which dimensions of a tensor count images and tokens, and which tokens it holds.

    Args:
        tokens: the token axis; of attention scores, that of the queries.
        batch: the batch axis.
        positions: the original positions of the tokens it holds, ascending.
        columns: of attention scores, the second token axis, that of the keys.
        weights: whether these are attention weights, which sum to 1 over the keys.
    """

    tokens: Axis
    batch: Axis
    positions: tuple[int, ...]
    columns: Axis | None = None
    weights: bool = False

    @property
    def plain(self) -> bool:
        """Batch first and no axis folded: what ``tome::`` operators take."""
        first = self.batch == Axis(0) and self.tokens.dim > 0
        return first and all(axis.whole for axis in self.axes)

    @property
    def keys(self) -> Axis:
        """The axis a softmax over tokens runs along."""
        return self.tokens if self.columns is None else self.columns

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The token axes: one, or two for attention scores."""
        return (self.tokens,) if self.columns is None else (self.tokens, self.columns)


@dataclass(frozen=True)
class Side:
    """An operand with one row for each token that is not itself computed from the tokens.

    An example is a table of position embeddings.

    Args:
        node: the operand.
        how: what takes its place once tokens have merged. ``"mean"``: the mean of the rows that
            merged (the operand is added). ``"kept"``: the row of the token merged into (it
            multiplies, as a rotary table does). ``"bias"``, of attention scores: the mean over
            queries and the log-mean-exp over keys. ``"nothing"``: a mask that hides nothing, which
            is left out. ``"read"``: it was computed from the tokens by position, so nothing can
            take its place.
        factor: what a bias is multiplied by before the softmax takes its exponential: -1 where it
            is subtracted, and where scores are scaled after it was added, their scale.
    """

    node: fx.Node
    how: Literal["mean", "kept", "bias", "nothing", "read"]
    factor: float = 1.0


@dataclass(frozen=True)
class Carried:
    """The result holds the same tokens.

    Args:
        layout: of the result.
        sizes: which entries of the operator's shape argument count tokens, and along which axis.
        sides: operands with rows of their own that meet the tokens.
    """

    layout: Layout
    sizes: tuple[tuple[int, Axis], ...] = ()
    sides: tuple[Side, ...] = ()


@dataclass(frozen=True)
class Taken:
    """A slice or select along the tokens that takes protected tokens, or all others, or all.

    Args:
        positions: original positions taken, ascending.
        dim: the token dimension of the operand.
        layout: of the result, None where only protected tokens are left.
        drops: whether the token dimension disappears, as in a select.
    """

    positions: tuple[int, ...]
    dim: int
    layout: Layout | None
    drops: bool


@dataclass(frozen=True)
class Divided:
    """A split along the tokens into pieces that may each be :class:`Taken`.

    Args:
        pieces: original positions in each.
        layout: of the operand.
    """

    pieces: tuple[tuple[int, ...], ...]
    layout: Layout


@dataclass(frozen=True)
class Joined:
    """A ``cat`` of protected tokens and the others, back into one sequence.

    Args:
        layout: of the result.
        parts: the original positions of each operand.
    """

    layout: Layout
    parts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Averaged:
    """A mean over all tokens of the operand: weighted by size once tokens have merged."""

    dim: int
    keepdim: bool


@dataclass(frozen=True)
class Attended:
    """A fused attention whose keys are all tokens.

    Args:
        layout: of the result, None where the queries are no tokens of the stream (pooling).
        keys: of the keys and values.
        bias: a position bias among the tokens.
        padding: a mask that hides some tokens from all others.
    """

    layout: Layout | None
    keys: Layout
    bias: fx.Node | None = None
    padding: fx.Node | None = None


@dataclass(frozen=True)
class Weighed:
    """A softmax over all tokens: sizes belong into it. ``layout`` is of the result."""

    layout: Layout


@dataclass(frozen=True)
class Contracted:
    """A sum over all tokens with attention weights: exact as it stands, no tokens are left."""


@dataclass(frozen=True)
class Positional:
    """The operator reads tokens by position: unmerge first."""

    reason: str


@dataclass(frozen=True)
class Masked(Positional):
    """An attention in which not every token sees, or may not see, every other: unmerge first."""

    advice: str


Outcome = (
    Carried | Taken | Divided | Joined | Averaged | Attended | Weighed | Contracted | Positional
)


# Operators whose shape argument names the sizes of the result, and where it stands.
SIZED = {
    aten.view.default: 1,
    aten.reshape.default: 1,
    aten._unsafe_view.default: 1,
    aten.expand.default: 1,
    aten.unflatten.int: 2,
}


def length_along(node: fx.Node, axis: Axis) -> Size:
    return shape_of(node)[axis.dim] // (axis.before * axis.after)


def has_rows(node: fx.Node, operand: fx.Node, layout: Layout) -> bool:
    """Is the operand, aligned with the result as broadcasting does, longer than 1 at a token?"""
    value, shape = operand.meta.get("val"), shape_of(node)
    if not isinstance(value, Tensor):
        return False
    if node.target in (aten.cat.default, aten.stack.default):
        return True
    if node.target is aten.einsum.default:
        return _shares_letter(node, operand, layout)
    if node.target in (aten.matmul.default, aten.bmm.default):
        # Of a batch of matrices each multiplies what stands beside it.
        batched = [axis.dim - (len(shape) - value.ndim) for axis in layout.axes]
        return any(0 <= d < value.ndim - 2 and not same(value.shape[d], 1) for d in batched)
    aligned = node.target is aten.expand_as.default
    if node.target is aten.baddbmm.default:  # the factors do not line up with the result
        aligned = operand is node.args[0] and not ignores_first(node)
    if not (is_pointwise(node) or aligned):
        return False
    dims = [value.ndim - (len(shape) - axis.dim) for axis in layout.axes]
    return any(dim >= 0 and not same(value.shape[dim], 1) for dim in dims)


def _shares_letter(node: fx.Node, operand: fx.Node, layout: Layout) -> bool:
    """Does an operand of an einsum run along an axis of tokens of its result?"""
    terms, _, result = str(node.args[0]).replace(" ", "").partition("->")
    places = [i for i, other in enumerate(node.args[1]) if other is operand]  # type: ignore[arg-type]
    letters = {result[axis.dim] for axis in layout.axes}
    return any(letters & set(terms.split(",")[place]) for place in places)


def open_sizes(node: fx.Node, operand: fx.Node, layout: Layout) -> Iterator[tuple[int, Axis]]:
    """The entries of a shape argument that count tokens."""
    first = 0
    if node.target is aten.unflatten.int:
        (first,) = dimensions(node.args[1], len(shape_of(operand)))
    elif node.target not in SIZED:
        return
    sizes = node.args[SIZED[node.target]]
    for axis in layout.axes:
        if 0 <= axis.dim - first < len(sizes):  # type: ignore[arg-type]
            yield axis.dim - first, axis
