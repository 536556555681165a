"""Writes what follows from a merge: merged tokens, their sizes, index maps, tables and biases.

After a merge a stream has fewer tokens. Whatever is combined with them afterwards has to have as
many rows: other tensors that hold tokens, position tables that are added or multiplied, biases of
attention scores, and the maps from original tokens to merged ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from tomepass.graphs.nodes import shape_of
from tomepass.methods import MLERP
from tomepass.ops.merging.combine import merge_max, mlerp
from tomepass.ops.merging.merge import merge
from tomepass.ops.merging.side import keep, merge_bias, merge_rows, rows
from tomepass.ops.merging.unmerge import compose, compose_held, narrow_source, unmerge
from tomepass.ops.padding import seen_stands
from tomepass.reading.axis import Axis
from tomepass.reading.layouts import Layout, Side
from tomepass.rewriting.epochs import Merges
from tomepass.rewriting.writer import Writer

aten = torch.ops.aten


class Carrying:
    """Writes tokens, sizes, index maps, tables and biases as they are after some merges.

    Args:
        writer: of the new graph.
        new: the node of the new graph for each node of the captured one.
    """

    def __init__(self, writer: Writer, new: dict[fx.Node, fx.Node]) -> None:
        self.writer, self.new = writer, new
        self.joined: list[tuple[fx.Node, fx.Node, int]] = []

    def combined(self, node: fx.Node, x: fx.Node, merges: Merges, epoch: int) -> fx.Node:
        """Tokens of an epoch as those of the next."""
        reduction, tokens = merges.reductions[epoch], merges.tokens[epoch + 1]
        assign, how = reduction.assign, reduction.combine
        self.joined.append((x, assign, tokens))
        weight = merges.sizes[epoch] if reduction.weight is None else reduction.weight
        hidden = merges.planned.padding is not None
        if isinstance(how, MLERP):
            return self.writer.emit(node, mlerp, x, weight, assign, tokens, how.norm)
        if how == "max":
            told_apart = (merges.sizes[epoch],) if hidden else ()
            return self.writer.emit(node, merge_max, x, assign, tokens, *told_apart)
        if how == "keep":
            return self.writer.emit(node, unmerge, x, self._stands(node, merges, epoch), 1)
        if how == "mean":
            weight = None
        if how == "mean" and hidden:  # each counts one, and padding next to nothing
            size = merges.sizes[epoch]
            weight = self.writer.emit(node, aten.clamp.default, size, None, 1.0)
        return self.writer.emit(node, merge, x, weight, assign, tokens)

    def _stands(self, node: fx.Node, merges: Merges, epoch: int) -> fx.Node:
        """Which position of an epoch stands for each token of the next."""
        reduction = merges.reductions[epoch]
        found = reduction.stands
        if found is None:
            tokens, held = merges.tokens[epoch + 1], list(merges.held(epoch))
            found = self.writer.emit(node, keep, None, reduction.assign, tokens, held)
        if merges.planned.padding is None or reduction.size is not None:
            return found
        return self.writer.emit(node, seen_stands, found, reduction.assign, merges.sizes[epoch])

    def sizes(self, node: fx.Node, merges: Merges, layout: Layout, epoch: int) -> fx.Node:
        """The sizes of the tokens a value holds."""
        size = merges.sizes[epoch]
        assert size is not None
        return self._among(node, merges, size, layout, epoch)

    def _among(
        self, node: fx.Node, merges: Merges, x: fx.Node, layout: Layout, epoch: int
    ) -> fx.Node:
        """Of ``x``, one entry a token of the whole sequence, those of the tokens a value holds."""
        indices = merges.indices(layout.positions, epoch, merges.planned.layout)
        return self.writer.slices(node, x, 1, indices) if len(indices) < merges.tokens[epoch] else x

    def source(self, node: fx.Node, merges: Merges, layout: Layout, epoch: int) -> fx.Node:
        """Which token holds each original one, among those that a value covers."""
        return self._narrowed(node, merges, merges.sources[epoch], layout)

    def _narrowed(
        self, node: fx.Node, merges: Merges, source: fx.Node | None, layout: Layout
    ) -> fx.Node:
        assert source is not None
        removed = merges.removed(layout)
        if not removed:
            return source
        gone = [merges.protected.index(p) for p in removed]
        return self.writer.emit(node, narrow_source, source, list(layout.positions), gone)

    # ---- what lies beside the tokens -------------------------------------------------------

    def side(
        self, node: fx.Node, merges: Merges, side: Side, layout: Layout, epoch: int
    ) -> fx.Node:
        """What the tokens there are at an epoch meet instead of a table of original ones."""
        table = self.new[side.node]
        if epoch == 0:
            return table
        # A symbolic size has no hash: the dimension stands for the axis.
        key = (side, epoch, layout.positions, layout.tokens.dim, len(shape_of(node)))
        if (made := merges.sides.get(key)) is not None:
            return made
        length, axis, ndim = merges.length(layout, epoch), layout.tokens, len(shape_of(node))
        if side.how == "bias" and layout.columns is not None:
            square = Layout(Axis(2), Axis(0), merges.planned.layout.positions, Axis(3))
            if replace(layout, weights=False) == square:
                made = self._bias(node, table, side.factor, merges.holds[epoch], length)
        elif side.how == "mean" and layout.plain and axis.dim == 1 and ndim == 3:
            holds = self._narrowed(node, merges, merges.holds[epoch], layout)
            made = self.writer.emit(node, merge_rows, table, holds, length)
        elif side.how == "kept" and layout.plain:
            kept = self._among(node, merges, self._kept(node, merges, epoch), layout, epoch)
            removed = merges.removed(layout)
            made = self.writer.emit(node, rows, table, kept, axis.dim, ndim, removed)
        if made is None:
            raise self.writer.error(
                node,
                f"{beside(side)}; it meets them after a merge, and carrying it through one is not "
                "supported (it was read off the tokens by position, or stands in another shape)",
            )
        merges.sides[key] = made
        return made

    def _bias(
        self, node: fx.Node, table: fx.Node, factor: float, holds: fx.Node | None, length: int
    ) -> fx.Node:
        """Over merged keys the exponential is averaged, of the bias as the softmax sees it."""
        if factor != 1:
            table = self.writer.emit(node, aten.mul.Tensor, table, factor)
        made = self.writer.emit(node, merge_bias, table, holds, length)
        return made if factor == 1 else self.writer.emit(node, aten.div.Tensor, made, factor)

    def _kept(self, node: fx.Node, merges: Merges, epoch: int) -> fx.Node:
        while len(merges.kept) <= epoch:
            e = len(merges.kept) - 1
            before, stands = merges.kept[e], merges.reductions[e].stands
            if stands is not None:
                known = (
                    stands if before is None else self.writer.emit(node, compose, stands, before)
                )
            else:
                tokens, held = merges.tokens[e + 1], list(merges.held(e))
                assign = merges.reductions[e].assign
                known = self.writer.emit(node, keep, before, assign, tokens, held)
            merges.kept.append(known)
        found = merges.kept[epoch]
        assert found is not None
        return found

    def holds(self, node: fx.Node, merges: Merges, epoch: int) -> fx.Node | None:
        """The source map without what was dropped; where nothing was, the source map itself."""
        holds, dropped = merges.reductions[epoch].holds, merges.holds[epoch]
        if holds is None and dropped is merges.sources[epoch]:
            return merges.sources[-1]
        latest = merges.reductions[epoch].assign if holds is None else holds
        return self.writer.emit(node, compose_held, dropped, latest)


def beside(side: Side) -> str:
    """Why tokens are unmerged before they meet an operand, for the report."""
    return f"operand {side.node.name!r} brings one row a token and does not come from the tokens"
