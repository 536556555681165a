"""Inserts the merge after a block's attention, where the plan removes tokens.

The method decides which tokens merge (:meth:`tomepass.methods.Method.reduce`). Here its index map
is applied to the residual stream, and the merge is added to the stream's :class:`Merges`.
"""

from __future__ import annotations

import torch
from torch import fx

from tomepass.graphs.nodes import shape_of
from tomepass.methods import Method
from tomepass.methods.reduction import Reduction
from tomepass.ops.merging.merge import merge_size
from tomepass.ops.merging.unmerge import compose
from tomepass.ops.padding import padded_size
from tomepass.reading.layouts import Attended
from tomepass.reading.structure import Block
from tomepass.rewriting.attending import Attending
from tomepass.rewriting.epochs import Merges
from tomepass.rewriting.reducing import Reducing
from tomepass.rewriting.values import Values

aten = torch.ops.aten


class Merging:
    """Writes the merges of all streams.

    Args:
        method: that decides on them.
        values: written so far.
        attending: writes the attentions of the same streams.
    """

    def __init__(self, method: Method, values: Values, attending: Attending) -> None:
        self.method, self.values, self.attending = method, values, attending
        self.writer, self.carrying = values.writer, values.carrying

    def merge(self, node: fx.Node, merges: Merges, block: Block, outcome: object) -> None:
        """Merges the tokens that a block leaves in the residual stream.

        Args:
            node: the stream after the block's attention.
            outcome: what becomes of the tokens in that attention.

        Raises:
            TomeError: if these are not the tokens that the last merge left.
        """
        plan = merges.planned.plan.blocks[block.index]
        epoch = self.values.epoch[node]
        if merges.tokens[epoch] != plan.tokens_in or merges.epoch != epoch:
            raise self.writer.error(node, "the residual stream does not follow from the last merge")
        if epoch == 0 and (mask := merges.planned.padding) is not None:
            seen = self.values.new[mask]
            if len(shape_of(mask)) == 3:
                seen = self.writer.emit(node, aten.unsqueeze.default, seen, 1)
            merges.sizes[0] = self.writer.emit(node, padded_size, seen, self.values.new[node])
        reduction = self._reduction(node, merges, block, outcome)
        assign, size = reduction.assign, merges.sizes[epoch]
        merges.reductions.append(reduction)
        merges.blocks.append(block.index)
        merges.tokens.append(plan.tokens_out)
        # Kernels make the sizes together with the tokens, so these come first.
        merged = self.carrying.combined(node, self.values.new[node], merges, epoch)
        after = reduction.size
        if after is None:
            after = self.writer.emit(node, merge_size, size, assign, plan.tokens_out)
        merges.sizes.append(after)
        merges.sources.append(self.writer.emit(node, compose, merges.sources[epoch], assign))
        merges.holds.append(self.carrying.holds(node, merges, epoch))
        self.values.new[node] = merged
        self.values.epoch[node] = epoch + 1
        self.writer.compare(node, merged, self.values.layouts[node], plan.tokens_out)

    def _reduction(self, node: fx.Node, merges: Merges, block: Block, outcome: object) -> Reduction:
        """What the method does with a block's tokens."""
        plan = merges.planned.plan.blocks[block.index]

        def bias() -> fx.Node | None:
            if not isinstance(outcome, Attended):
                return None
            return self.attending.position_bias(node, outcome, merges, merges.epoch)

        reducing = Reducing(
            index=block.index,
            depth=len(merges.planned.plan.blocks),
            tokens=plan.tokens_in,
            r=plan.r,
            protected=list(merges.held(merges.epoch)),
            memory=merges.memory,
            _writer=self.writer,
            _node=node,
            _method=self.method,
            _merges=merges,
            _block=block,
            _hidden=self.values.new[node],
            _read=lambda operand: self.values.at_epoch(operand, merges.epoch),
            _layouts=self.values.layouts,
            _bias=bias,
        )
        return self.method.reduce(reducing)
