"""Writes proportional attention: attention in which a merged token counts as all it stands for.

The logarithm of each key's size is added to the attention scores, in a fused attention as a bias,
in one that is written out before its softmax. Position biases are merged as the tokens are.
"""

from __future__ import annotations

import torch
from torch import fx

from tomepass.methods import Method
from tomepass.ops.attending.log_size import log_size
from tomepass.ops.attending.soft import masked_attention
from tomepass.reading.axis import Axis
from tomepass.reading.layouts import Attended, Layout, Side
from tomepass.rewriting.carrying import Carrying
from tomepass.rewriting.epochs import Merges

aten = torch.ops.aten

Operands = tuple[fx.Node, fx.Node, fx.Node]
"""Queries, keys and values."""


class Attending:
    """Writes the attentions of streams that lose tokens.

    Args:
        method: the method that removes them.
        carrying: writes token sizes and merged biases.
    """

    def __init__(self, method: Method, carrying: Carrying) -> None:
        self.method, self.carrying, self.writer = method, carrying, carrying.writer

    def fused(
        self,
        node: fx.Node,
        outcome: Attended,
        merges: Merges,
        epoch: int,
        operands: Operands,
    ) -> fx.Node:
        """Attention as the model's own operator: what merged keys weigh is added to the scores."""
        bias = self._attention_bias(node, outcome, merges, epoch, operands[0])
        kwargs = {n: a for n, a in node.kwargs.items() if n != "attn_mask"}
        return self.writer.emit(node, node.target, *operands, bias, *node.args[4:], **kwargs)

    def softly(
        self,
        node: fx.Node,
        outcome: Attended,
        merges: Merges,
        epoch: int,
        operands: Operands,
    ) -> fx.Node:
        """In training, attention whose exponentials the sizes multiply."""
        keep = self.carrying.sizes(node, merges, outcome.keys, epoch)
        bias = self.position_bias(node, outcome, merges, epoch)
        own = outcome.layout is not None and outcome.layout.positions == outcome.keys.positions
        scale = node.kwargs.get("scale")
        return self.writer.emit(node, masked_attention, *operands, keep, bias, scale, own)

    def position_bias(
        self, node: fx.Node, outcome: Attended, merges: Merges, epoch: int
    ) -> fx.Node | None:
        """The position bias of an attention, for the tokens there are at an epoch."""
        if outcome.bias is None:
            return None
        scores = Layout(Axis(2), Axis(0), outcome.keys.positions, Axis(3))
        return self.carrying.side(node, merges, Side(outcome.bias, "bias"), scores, epoch)

    def _attention_bias(
        self, node: fx.Node, outcome: Attended, merges: Merges, epoch: int, query: fx.Node
    ) -> fx.Node | None:
        """What is added to the scores of a fused attention: position bias and log(size)."""
        if epoch == 0 and outcome.padding is not None:
            return self.carrying.new[outcome.padding]
        bias = self.position_bias(node, outcome, merges, epoch)
        if not epoch or not (self.method.prop_attn or merges.masked):
            return bias
        size = self.carrying.sizes(node, merges, outcome.keys, epoch)
        log = self.log(node, size, query, 3)
        return log if bias is None else self.writer.emit(node, aten.add.Tensor, bias, log)

    def log(self, node: fx.Node, size: fx.Node, like: fx.Node, *args: int) -> fx.Node:
        """log(size), as proportional attention adds it to scores (ToMe, equation 1)."""
        log = self.writer.emit(node, log_size, size, like, *args)
        if not self.method.prop_attn:  # what is left of the sizes hides padding and holes
            log = self.writer.emit(node, aten.clamp.default, log, None, 0.0)
        return log
