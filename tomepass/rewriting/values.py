"""Which node of the new graph stands for which node of the captured one.

For tensors that hold tokens it also records the stream, the token dimension and the epoch, that is
how many merges their tokens had been through, and brings a tensor of an earlier epoch up to a
later one, or back to the original tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from tomepass.capture.regions import bodies
from tomepass.graphs.nodes import is_tensor, same_shape, shape_of
from tomepass.graphs.walks import answered
from tomepass.ops.merging.unmerge import unmerge
from tomepass.reading.layouts import Layout
from tomepass.rewriting.carrying import Carrying
from tomepass.rewriting.epochs import Merges
from tomepass.rewriting.writer import Writer

aten = torch.ops.aten


class Values:
    """The nodes written so far, and how a value of one epoch becomes that of another.

    Args:
        writer: of the new graph.

    Attributes:
        new: the node of the new graph for each node of the captured one.
        layouts: for values that hold tokens, which dimensions count images and tokens.
        stream_of: for the same, the stream whose tokens they hold.
        epoch: for the same, how many merges their tokens have been through.
        carrying: writes token sizes, index maps, tables and biases.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.new: dict[fx.Node, fx.Node] = {}
        self.layouts: dict[fx.Node, Layout] = {}
        self.stream_of: dict[fx.Node, Merges] = {}
        self.epoch: dict[fx.Node, int] = {}
        self.carrying = Carrying(writer, self.new)
        self._whole: dict[fx.Node, fx.Node] = {}

    def copy(self, node: fx.Node) -> fx.Node:
        """A copy of a node that reads what stands for its operands."""
        return self.copy_with(node, {})

    def copy_with(self, node: fx.Node, operands: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """A copy that reads original tokens only, if any: its result is what it always was."""
        copy = self.writer.graph.node_copy(node, lambda a: operands.get(a, self.new[a]))
        # What runs graphs of its own, the branches of a torch.cond, cannot be run on its own.
        alone = next(bodies(node), None) is None
        if alone and any(a in self.writer.touched for a in copy.all_input_nodes):
            self.writer.relaid(copy)
            self.writer.execute(copy)
            if is_tensor(node) and not same_shape(copy, node):
                raise self.writer.error(
                    node, f"expected {list(shape_of(node))}, got {list(shape_of(copy))}"
                )
        return copy

    def at_epoch(self, node: fx.Node, epoch: int) -> fx.Node:
        """The value of a token holder, merged as often as the stream had been at ``epoch``."""
        merges, layout = self.stream_of[node], self.layouts[node]
        x = self.new[node]
        for e in range(self.epoch[node], epoch):
            whole = layout.plain and len(layout.positions) == merges.tokens[0]
            if not whole or layout.tokens.dim != 1 or len(shape_of(node)) != 3:
                reason = "a value from before a merge meets the tokens after it"
                raise self.writer.error(node, reason)
            x = self.carrying.combined(node, x, merges, e)
        return x

    def unmerged(self, reader: fx.Node, operand: fx.Node) -> fx.Node:
        """The value of a token holder for every original token."""

        def needs(node: fx.Node) -> list[fx.Node]:
            if self.epoch.get(node, 0) == 0 or self.layouts[node].plain:
                return []
            return [a for a in node.all_input_nodes if a in self.layouts]

        def answer(node: fx.Node) -> fx.Node:
            if self.epoch.get(node, 0) == 0:
                return self.new[node]
            if self.layouts[node].plain:
                return self._unmerge(reader, node)
            # What keeps tokens apart does the same to original ones: unmerge before it.
            if _writes(node):  # it would write twice
                raise self.writer.error(reader, f"it reads what {node.name} wrote in place")
            return self.copy_with(node, {a: self._whole[a] for a in needs(node)})

        return answered(operand, self._whole, needs, answer)

    def _unmerge(self, reader: fx.Node, operand: fx.Node) -> fx.Node:
        merges, layout = self.stream_of[operand], self.layouts[operand]
        epoch = self.epoch[operand]
        source = self.carrying.source(reader, merges, layout, epoch)
        x = self.new[operand]
        for axis in layout.axes:
            x = self.writer.emit(reader, unmerge, x, source, axis.dim)
        if not layout.weights:
            return x
        # The tokens merged into a key share its weight.
        size = self.carrying.sizes(reader, merges, layout, epoch)
        shared = self.writer.emit(reader, unmerge, size, source, 1)
        shape = [1] * len(shape_of(operand))
        shape[0], shape[layout.keys.dim] = -1, len(layout.positions)
        shared = self.writer.emit(reader, aten.view.default, shared, shape)
        return self.writer.emit(reader, aten.div.Tensor, x, shared)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)
