"""What a method can read of a block in which it removes tokens.

:class:`Reducing` finds the queries, keys, values and attention weights of the block in the graph,
in whatever layout the model computes them, and returns them as ``[B, H, N, D]`` and ``[B, N]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from tomepass.graphs.nodes import same, shape_of
from tomepass.methods.block import ReducingBlock
from tomepass.reading.attention import Attention
from tomepass.reading.axis import summed_dimension
from tomepass.reading.layouts import Layout
from tomepass.reading.weights import fused_heads
from tomepass.rewriting.writer import Writer

if TYPE_CHECKING:
    from tomepass.methods import Method
    from tomepass.reading.structure import Block
    from tomepass.rewriting.epochs import Merges


aten = torch.ops.aten


@dataclass
class Reducing(ReducingBlock):
    """One block as a method sees it: its hidden state and the operands of its attention."""

    _writer: Writer
    _node: fx.Node
    _method: Method
    _merges: Merges
    _block: Block
    _hidden: fx.Node
    _read: Callable[[fx.Node], fx.Node]
    _layouts: dict[fx.Node, Layout]
    _bias: Callable[[], fx.Node | None]

    # ---- operators ---------------------------------------------------------------------------

    def call(self, name: str | Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A ``tome::`` operator by name, or any other functional operator."""
        target = getattr(torch.ops.tome, name).default if isinstance(name, str) else name
        return self._writer.emit(self._node, target, *args, **kwargs)

    def constant(self, tensor: torch.Tensor) -> fx.Node:
        """A tensor of the method's own, on the device of the stream."""
        return self._writer.constant(self._node, tensor.to(self.hidden.meta["val"].device))

    # ---- what there is to read ---------------------------------------------------------------

    @property
    def hidden(self) -> fx.Node:
        """The residual stream ``[B, N, C]``, after the block's attention."""
        return self._hidden

    @property
    def size(self) -> fx.Node | None:
        """``[B, N]`` float32: original tokens each one holds; None while all hold one."""
        return self._merges.sizes[self._merges.epoch]

    @property
    def masked(self) -> bool:
        """Whether some tokens are padding or out of use."""
        return self._merges.masked

    @cached_property
    def keys(self) -> fx.Node:
        """``[B, H, N, D]``, as the block's attention multiplies them."""
        return self._heads(self._block.attention.key, 0)

    @cached_property
    def queries(self) -> fx.Node:
        """``[B, H, N, D]``, as the block's attention multiplies them."""
        return self._heads(self._block.attention.query, 0)

    @cached_property
    def values(self) -> fx.Node:
        """``[B, H, N, D]``, as the block's attention weighs them."""
        return self._heads(self._block.attention.value, -1)

    @cached_property
    def class_attention(self) -> fx.Node:
        """``[B, N]``: what the first protected token pays each token, the mean over heads.

        Where no token is protected: what all pay, the mean over them.
        """
        return self.attention_to(self.protected[:1])

    def attention_to(self, queries: list[int]) -> fx.Node:
        """``[B, N]``: what the tokens at some positions pay each token, or all that are in use if
        none is named; the mean over them and over heads, summing to 1.
        """
        attention = self._block.attention
        if attention.scores:
            return self._read_weights(attention, queries)
        scale = attention.result.kwargs.get("scale")
        scale = shape_of(self.queries)[-1] ** -0.5 if scale is None else scale
        given = (self.queries, self.keys, self._counted, queries, scale)
        bias = self._bias()
        return self.call("attention_to", *given, *(() if bias is None else (bias,)))

    # ---- reading an attention, fused or written out ------------------------------------------

    @property
    def _counted(self) -> fx.Node | None:
        """The sizes as the block's attention counts them: without proportional attention what
        is left of them hides padding and what is out of use.
        """
        if self._method.prop_attn or self.masked_size is None:
            return self.size if self._method.prop_attn else None
        return self.call(aten.clamp.default, self.size, None, 1.0)

    def _heads(self, operand: fx.Node, product: int) -> fx.Node:
        """An operand as ``[B, H, N, D]``, whatever an attention written out has made of it."""
        attention = self._block.attention
        if operand not in self._layouts:
            raise self._writer.error(
                self._node,
                f"{self._method!r} reads {operand.name} off this attention, which is not made "
                "from the stream's tokens",
            )
        x = self._read(operand)
        if not attention.scores:
            heads = fused_heads(shape_of(operand), self._layouts[operand])
            return self._writer.heads_apart(self._node, x, heads)
        layout, ndim = self._layouts[operand], len(shape_of(operand))
        multiplied = attention.scores[0] if product == 0 else attention.result
        width = _width(multiplied, operand, layout)
        places = [layout.batch.dim, layout.tokens.dim, width]
        others = [d for d in range(ndim) if d not in places]
        if len(others) > 1 or not layout.tokens.whole:
            raise self._writer.error(
                self._node, f"expected keys of up to four dimensions, got {ndim}"
            )
        order = [places[0], *others, *places[1:]]
        if order != list(range(ndim)):
            x = self.call(aten.permute.default, x, order)
        if not same(layout.batch.after, 1):
            return self.call(aten.unflatten.int, x, 0, [-1, int(layout.batch.after)])
        return x if others else self.call(aten.unsqueeze.default, x, 1)

    def _read_weights(self, attention: Attention, queries: list[int]) -> fx.Node:
        """The attention each token gets, read off a softmax written out."""
        weights = attention.weights
        layout, ndim = self._layouts[weights], len(shape_of(weights))
        if layout.columns is None or not all(axis.whole for axis in layout.axes):
            raise self._writer.error(
                self._node,
                f"{self._method!r} reads attention weights off this softmax, whose "
                "tokens are folded with other dimensions",
            )
        places = [layout.batch.dim, layout.tokens.dim, layout.columns.dim]
        heads = [d for d in range(ndim) if d not in places]
        order = [places[0], *heads, *places[1:]]
        x = self._read(weights)
        if order != list(range(ndim)):
            x = self.call(aten.permute.default, x, order)
        if not same(layout.batch.after, 1):
            x = self.call(aten.unflatten.int, x, 0, [-1, int(layout.batch.after)])
        if not queries and self.masked_size is not None:
            x = self.call(aten.to.dtype, x, torch.float32)
            if len(shape_of(x)) > 3:
                x = self.call(aten.mean.dim, x, list(range(1, len(shape_of(x)) - 2)))
            return self.call("received", x, self.masked_size)
        rows = queries or list(range(self.tokens))
        x = self._writer.slices(self._node, x, len(shape_of(x)) - 2, rows)
        return self.call(
            aten.mean.dim, x, list(range(1, len(shape_of(x)) - 1)), dtype=torch.float32
        )


def _width(product: fx.Node, operand: fx.Node, layout: Layout) -> int:
    """The dimension of a query, key or value that holds a head's channels."""
    found = summed_dimension(product, operand)
    if found is not None and found != layout.tokens.dim:
        return found
    # Values are summed over their tokens: their channels are what the weights have not.
    if product.target is aten.einsum.default:
        terms = str(product.args[0]).replace(" ", "").partition("->")[0].split(",")
        place = list(product.args[1]).index(operand)  # type: ignore[arg-type]
        other = terms[1 - place]
        return next(i for i, letter in enumerate(terms[place]) if letter not in other)
    return len(shape_of(operand)) - 1
