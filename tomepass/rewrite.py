"""Stage 5: one forward sweep over a copy of the graph.

Inserted nodes are ``tome::`` operators. Every touched node is re-executed on fake tensors, and
its shape compared with the plan: metadata is never stale and a wrong count never silent.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from tomepass.attention import FUSED, ignores_first
from tomepass.axis import Axis, same_shape, shape_of
from tomepass.capture import CanonicalGraph
from tomepass.carrying import Carrying, beside
from tomepass.graphs import MATCHES
from tomepass.merges import Merges
from tomepass.ops.log_size import log_size
from tomepass.ops.merge import merge_size
from tomepass.ops.padding import padded_size
from tomepass.ops.soft import masked_attention
from tomepass.ops.unmerge import compose, unmerge
from tomepass.ops.weighted_mean import weighted_mean
from tomepass.outcomes import (
    Attended,
    Averaged,
    Carried,
    Contracted,
    Divided,
    Joined,
    Layout,
    Positional,
    Side,
    Taken,
    Weighed,
)
from tomepass.planning import Planned
from tomepass.reducing import Reducing
from tomepass.reduction import Reduction
from tomepass.regions import bodies
from tomepass.structure import Block, Mismatch, is_tensor
from tomepass.tokens import SIZED, fused_heads
from tomepass.walks import answered
from tomepass.writing import Writer

aten = torch.ops.aten

_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default)

_PADDED = "it counts padding, which the stream's attentions leave out"
_MIXED = "it combines tokens from before a merge with tokens from after it"


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph.

    Args:
        module: the graph, callable like the one it was made from.
        source: the name of the node that maps original tokens of the first stream to final
            ones; None if it is not traced, or nothing merges.
        sizes: the name of the sizes after each block of the first stream, if they were asked for:
            None while nothing was reduced.
        joined: with the sizes: the names of tokens that are made fewer and of where each goes, and
            how many are left, for every value that carries them.
        matches: for each stream and block, the name of its match, None where nothing merges.
        referenced: whether :mod:`tomepass.reference` knows all that was done.
        unmerged: where and why tokens are unmerged before a reader, for the report.
        returned: how each token sequence leaves the graph, by its name in the captured graph.
        renamed: for each node of the captured graph, the node that stands for it now.
    """

    module: fx.GraphModule
    source: str | None
    matches: tuple[tuple[str | None, ...], ...]
    referenced: bool
    unmerged: tuple[Mismatch, ...]
    returned: dict[str, str]
    renamed: dict[str, str]
    sizes: tuple[str | None, ...] = ()
    joined: tuple[tuple[str, str, int], ...] = ()


def rewrite(
    captured: CanonicalGraph, planned: Planned, *, outputs: str = "original", sizes: bool = False
) -> Rewritten:
    """Inserts the plan's merges. The given graph is left as it is.

    Args:
        outputs: ``"original"`` unmerges token sequences that the model returns, ``"merged"``
            returns them short.
        sizes: keep those after each block of the first stream in the graph.

    Raises:
        TomeError: if a value cannot be carried through a merge.
    """
    _dump(captured.module, "before")
    sweep = _Sweep(captured, planned, keep_short=outputs == "merged", keep_sizes=sizes)
    rewritten = sweep.run()
    _dump(rewritten.module, "after")
    return rewritten


class _Sweep:
    def __init__(
        self, captured: CanonicalGraph, planned: Planned, *, keep_short: bool, keep_sizes: bool
    ) -> None:
        self.captured = captured
        self.method = planned.method
        self.keep_short = keep_short
        self.keep_sizes = keep_sizes
        self.writer = Writer(captured.fake_mode)
        self.new: dict[fx.Node, fx.Node] = {}
        self.carrying = Carrying(self.writer, self.new)
        self.epoch: dict[fx.Node, int] = {}
        self.whole: dict[fx.Node, fx.Node] = {}
        self.unmerged: list[Mismatch] = []
        self.returned: dict[str, str] = {}
        holes = planned.method.holes
        self.streams = [Merges(p, masked=holes or p.padding is not None) for p in planned.streams]
        self.stream_of: dict[fx.Node, Merges] = {}
        self.outcomes: dict[fx.Node, Any] = {}
        self.layouts: dict[fx.Node, Layout] = {}
        self.merge_points: dict[fx.Node, tuple[Merges, Block]] = {}
        self.entries: dict[fx.Node, int] = {}
        for merges in self.streams:
            self._enlist(merges)

    def _enlist(self, merges: Merges) -> None:
        flow, stream = merges.planned.flow, merges.planned.stream
        if shared := [node for node in flow.layouts if node in self.layouts]:
            raise self.writer.error(shared[0], "two residual streams meet here")
        self.layouts.update(flow.layouts)
        self.outcomes.update(flow.outcomes)
        self.stream_of.update(dict.fromkeys(flow.layouts, merges))
        plans = merges.planned.plan.blocks
        every = self.method.every_block and any(plan.r for plan in plans)
        for block, plan in zip(stream.blocks, plans, strict=True):
            self.entries[block.entry] = block.index
            if plan.r or every:
                self.merge_points[block.merge_at] = (merges, block)

    # ---- the sweep -------------------------------------------------------------------------

    def run(self) -> Rewritten:
        for node in self.captured.graph.nodes:
            if node.op == "output":
                self._output(node)
                continue
            self.new[node] = self._node(node)
            self.writer.block = self.entries.get(node, self.writer.block)
            if node in self.layouts and node not in self.epoch:
                self.epoch[node] = 0
            if node in self.merge_points:
                self._merge(node)
            if any(node is m.planned.stream.blocks[-1].merge_at for m in self.streams):
                self.writer.block = None
        source = self.streams[0].sources[-1] if self.method.trace_source else None
        sizes = self.streams[0].counted if self.keep_sizes else ()
        chosen = [r.chosen for m in self.streams for r in m.reductions if self.method.soft]
        joined = self.carrying.joined if self.keep_sizes else []
        self._drop_dead(keep={source, *sizes, *chosen, *(assign for _, assign, _ in joined)})
        module = self.writer.module(self.captured.module)
        module.meta.update(self.captured.module.meta)
        live = set(self.writer.graph.nodes)
        return Rewritten(
            module,
            None if source is None else source.name,
            tuple(m.matches for m in self.streams),
            all(_is_referenced(r) for m in self.streams for r in m.reductions),
            tuple(self.unmerged),
            self.returned,
            {old.name: new.name for old, new in self.new.items() if new in live},
            tuple(None if size is None else size.name for size in sizes),
            tuple((x.name, assign.name, tokens) for x, assign, tokens in joined if x in live),
        )

    def _node(self, node: fx.Node) -> fx.Node:
        outcome = self.outcomes.get(node)
        holders = [a for a in node.all_input_nodes if self.epoch.get(a, 0) > 0]
        if isinstance(outcome, Attended):
            return self._attend(node, outcome)
        if outcome is None or not holders:
            return self._copy(node)
        merges = self.stream_of[holders[0]]
        counted = isinstance(outcome, (Averaged, Weighed, Contracted))
        if counted and merges.planned.padding is not None:
            return self._unmerge_first(node, Positional(_PADDED))
        if isinstance(outcome, Carried):
            return self._carry(node, outcome, merges)
        if isinstance(outcome, Weighed):
            return self._weigh(node, outcome, merges)
        if isinstance(outcome, Taken):
            return self._take(node, outcome, merges)
        if isinstance(outcome, Divided):
            # Its pieces are taken from what was to be split.
            self.epoch[node] = self.epoch[holders[0]]
            return self.new[holders[0]]
        if isinstance(outcome, Joined):
            return self._join(node, outcome, merges)
        if isinstance(outcome, Averaged):
            return self._average(node, outcome, merges)
        if isinstance(outcome, Contracted):
            return self._contract(node)
        return self._unmerge_first(node, outcome)

    def _copy(self, node: fx.Node) -> fx.Node:
        return self._copy_with(node, {})

    def _copy_with(self, node: fx.Node, operands: Mapping[fx.Node, fx.Node]) -> fx.Node:
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

    # ---- one handler an outcome ------------------------------------------------------------

    def _carry(self, node: fx.Node, outcome: Carried, merges: Merges) -> fx.Node:
        holders = [a for a in node.all_input_nodes if a in self.layouts]
        epoch = max(self.epoch[a] for a in holders)
        if node not in merges.planned.inner:
            if any(self.epoch[a] < epoch for a in holders):
                return self._unmerge_first(node, Positional(_MIXED))
            if outcome.sides:
                return self._unmerge_first(node, Positional(beside(outcome.sides[0])))
        inputs = {a: self._at_epoch(a, epoch) for a in holders}
        if any(side.how == "nothing" for side in outcome.sides):
            self.epoch[node] = epoch
            return inputs[holders[0]]
        for side in outcome.sides:
            inputs[side.node] = self.carrying.side(node, merges, side, outcome.layout, epoch)
        if ignores_first(node):
            # It has the shape of the original scores, and is not read.
            blank = self.writer.emit(node, aten.new_zeros.default, inputs[holders[0]], [1])
            inputs[node.args[0]] = blank  # type: ignore[index]
        copy = self.writer.graph.node_copy(node, lambda a: inputs.get(a, self.new[a]))
        if outcome.sizes:
            self._resize(copy, outcome, merges, epoch)
        self.writer.relaid(copy)
        self.writer.execute(copy)
        self.epoch[node] = epoch
        self.writer.compare(node, copy, outcome.layout, merges.length(outcome.layout, epoch))
        return copy

    def _weigh(self, node: fx.Node, outcome: Weighed, merges: Merges) -> fx.Node:
        (operand,) = node.all_input_nodes
        epoch, layout = self.epoch[operand], self.layouts[operand]
        scores = self.new[operand]
        if self.method.prop_attn or merges.masked:
            size = self.carrying.sizes(node, merges, layout, epoch)
            fold = int(layout.batch.after)
            bias = self._log(node, size, scores, layout.keys.dim, fold)
            scores = self.writer.emit(node, aten.add.Tensor, scores, bias)
        copy = self.writer.graph.node_copy(node, lambda a: scores if a is operand else self.new[a])
        self.writer.execute(copy)
        self.epoch[node] = epoch
        self.writer.compare(node, copy, outcome.layout, merges.length(layout, epoch))
        return copy

    def _contract(self, node: fx.Node) -> fx.Node:
        holders = [a for a in node.all_input_nodes if a in self.layouts]
        epoch = max(self.epoch[a] for a in holders)
        return self._copy_with(node, {a: self._at_epoch(a, epoch) for a in holders})

    def _join(self, node: fx.Node, outcome: Joined, merges: Merges) -> fx.Node:
        """Puts the parts together in the order merged sequences have: protected tokens first."""
        dim, operands = outcome.layout.tokens.dim, list(node.args[0])  # type: ignore[arg-type]
        (holder,) = [a for a in operands if a in self.layouts]
        epoch = self.epoch[holder]
        pieces = []
        for operand, positions in zip(operands, outcome.parts, strict=True):
            x = self.new[operand]
            if operand is holder:
                own = [p for p in positions if p in merges.protected]
                rest = range(len(own), merges.length(self.layouts[holder], epoch))
                if own:
                    pieces.append((own, self.writer.slices(node, x, dim, list(range(len(own))))))
                    x = self.writer.slices(node, x, dim, list(rest))
                last = x
            else:
                pieces.append((list(positions), x))
        pieces.sort(key=lambda piece: piece[0])
        order = [p for positions, _ in pieces for p in positions]
        if order != sorted(order):
            return self._unmerge_first(node, Positional("a cat interleaves protected tokens"))
        parts = [x for _, x in pieces] + [last]
        joined = self.writer.emit(node, aten.cat.default, parts, dim)
        self.epoch[node] = epoch
        self.writer.compare(node, joined, outcome.layout, merges.length(outcome.layout, epoch))
        return joined

    def _take(self, node: fx.Node, outcome: Taken, merges: Merges) -> fx.Node:
        operand = node.all_input_nodes[0]
        epoch = self.epoch[operand]
        indices = merges.indices(outcome.positions, epoch, self.layouts[operand])
        x = self.new[operand]
        if outcome.drops:
            taken = self.writer.emit(node, aten.select.int, x, outcome.dim, indices[0])
        else:
            taken = self.writer.slices(node, x, outcome.dim, indices)
        if outcome.layout is not None:
            self.epoch[node] = epoch
        return taken

    def _average(self, node: fx.Node, outcome: Averaged, merges: Merges) -> fx.Node:
        operand = node.all_input_nodes[0]
        layout, epoch = self.layouts[operand], self.epoch[operand]
        if not layout.plain:
            reason = "a mean over tokens that are folded with the batch or not batch first"
            return self._unmerge_first(node, Positional(reason))
        size = self.carrying.sizes(node, merges, layout, epoch)
        x = self.new[operand]
        if (dtype := node.kwargs.get("dtype")) is not None:
            x = self.writer.emit(node, aten.to.dtype, x, dtype)
        return self.writer.emit(node, weighted_mean, x, size, outcome.dim, outcome.keepdim)

    def _unmerge_first(self, node: fx.Node, outcome: Positional) -> fx.Node:
        self.unmerged.append(Mismatch.at(node, outcome.reason))
        merged = [a for a in node.all_input_nodes if self.epoch.get(a, 0) > 0]
        return self._copy_with(node, {a: self._unmerged(node, a) for a in merged})

    def _attend(self, node: fx.Node, outcome: Attended) -> fx.Node:
        operands: list[fx.Node] = list(node.args[:3])  # type: ignore[arg-type]
        held = [a for a in operands if a in self.layouts]
        merges = self.stream_of[held[-1]]
        if not any(block.r for block in merges.planned.plan.blocks):
            return self._copy(node)
        epoch = max(self.epoch[a] for a in held)
        if epoch and outcome.padding is not merges.planned.padding:
            return self._unmerge_first(node, Positional(_PADDED))
        if node not in merges.planned.inner:
            if any(self.epoch[a] < epoch for a in held):
                return self._unmerge_first(node, Positional(_MIXED))
            if outcome.bias is not None and epoch:
                return self._unmerge_first(node, Positional(beside(Side(outcome.bias, "bias"))))
        q, k, v = (self._at_epoch(a, epoch) if a in held else self.new[a] for a in operands)
        if not epoch:
            copy = self._fused(node, outcome, merges, epoch, (q, k, v))
        else:
            heads = fused_heads(shape_of(operands[1]), outcome.keys)
            apart = [self.writer.heads_apart(node, x, heads) for x in (q, k, v)]
            attend = self._attend_softly if self.method.soft else self._fused
            copy = attend(node, outcome, merges, epoch, (apart[0], apart[1], apart[2]))
            if heads is not None:
                shape = [-1, *shape_of(q)[1:-1], shape_of(v)[-1]]
                copy = self.writer.emit(node, aten.reshape.default, copy, shape)
        if outcome.layout is not None:
            self.epoch[node] = epoch
            self.writer.compare(node, copy, outcome.layout, merges.length(outcome.layout, epoch))
        return copy

    def _fused(
        self,
        node: fx.Node,
        outcome: Attended,
        merges: Merges,
        epoch: int,
        operands: tuple[fx.Node, fx.Node, fx.Node],
    ) -> fx.Node:
        bias = self._attention_bias(node, outcome, merges, epoch, operands[0])
        kwargs = {n: a for n, a in node.kwargs.items() if n != "attn_mask"}
        return self.writer.emit(node, node.target, *operands, bias, *node.args[4:], **kwargs)

    def _attend_softly(
        self,
        node: fx.Node,
        outcome: Attended,
        merges: Merges,
        epoch: int,
        operands: tuple[fx.Node, fx.Node, fx.Node],
    ) -> fx.Node:
        """In training, attention whose exponentials the sizes multiply."""
        keep = self.carrying.sizes(node, merges, outcome.keys, epoch)
        bias = self._position_bias(node, outcome, merges, epoch)
        own = outcome.layout is not None and outcome.layout.positions == outcome.keys.positions
        scale = node.kwargs.get("scale")
        return self.writer.emit(node, masked_attention, *operands, keep, bias, scale, own)

    def _position_bias(
        self, node: fx.Node, outcome: Attended, merges: Merges, epoch: int
    ) -> fx.Node | None:
        if outcome.bias is None:
            return None
        scores = Layout(Axis(2), Axis(0), outcome.keys.positions, Axis(3))
        return self.carrying.side(node, merges, Side(outcome.bias, "bias"), scores, epoch)

    def _attention_bias(
        self, node: fx.Node, outcome: Attended, merges: Merges, epoch: int, query: fx.Node
    ) -> fx.Node | None:
        """What is added to the scores of a fused attention: position bias and log(size)."""
        if epoch == 0 and outcome.padding is not None:
            return self.new[outcome.padding]
        bias = self._position_bias(node, outcome, merges, epoch)
        if not epoch or not (self.method.prop_attn or merges.masked):
            return bias
        size = self.carrying.sizes(node, merges, outcome.keys, epoch)
        log = self._log(node, size, query, 3)
        return log if bias is None else self.writer.emit(node, aten.add.Tensor, bias, log)

    def _log(self, node: fx.Node, size: fx.Node, like: fx.Node, *args: int) -> fx.Node:
        log = self.writer.emit(node, log_size, size, like, *args)
        if not self.method.prop_attn:  # what is left of the sizes hides padding and holes
            log = self.writer.emit(node, aten.clamp.default, log, None, 0.0)
        return log

    def _output(self, node: fx.Node) -> None:
        def left(operand: fx.Node) -> fx.Node:
            epoch = self.epoch.get(operand, 0)
            if epoch:
                layout = self.layouts[operand]
                short, full = self.stream_of[operand].length(layout, epoch), len(layout.positions)
                how = f"merged, {short}" if self.keep_short else f"unmerged from {short} to {full}"
                self.returned[operand.name] = f"returned {how} tokens"
            return self.new[operand] if self.keep_short else self._unmerged(node, operand)

        self.writer.graph.node_copy(node, left)

    # ---- merging and back ------------------------------------------------------------------

    def _merge(self, node: fx.Node) -> None:
        merges, block = self.merge_points[node]
        plan = merges.planned.plan.blocks[block.index]
        epoch = self.epoch[node]
        if merges.tokens[epoch] != plan.tokens_in or merges.epoch != epoch:
            raise self.writer.error(node, "the residual stream does not follow from the last merge")
        if epoch == 0 and (mask := merges.planned.padding) is not None:
            seen = self.new[mask]
            if len(shape_of(mask)) == 3:
                seen = self.writer.emit(node, aten.unsqueeze.default, seen, 1)
            merges.sizes[0] = self.writer.emit(node, padded_size, seen, self.new[node])
        reduction = self._reduction(node, merges, block)
        assign, size = reduction.assign, merges.sizes[epoch]
        merges.reductions.append(reduction)
        merges.blocks.append(block.index)
        merges.tokens.append(plan.tokens_out)
        # Kernels make the sizes together with the tokens, so these come first.
        merged = self.carrying.combined(node, self.new[node], merges, epoch)
        after = reduction.size
        if after is None:
            after = self.writer.emit(node, merge_size, size, assign, plan.tokens_out)
        merges.sizes.append(after)
        merges.sources.append(self.writer.emit(node, compose, merges.sources[epoch], assign))
        merges.holds.append(self.carrying.holds(node, merges, epoch))
        self.new[node] = merged
        self.epoch[node] = epoch + 1
        self.writer.compare(node, merged, self.layouts[node], plan.tokens_out)

    def _reduction(self, node: fx.Node, merges: Merges, block: Block) -> Reduction:
        """What the method does with a block's tokens."""
        plan = merges.planned.plan.blocks[block.index]
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
            _hidden=self.new[node],
            _read=lambda operand: self._at_epoch(operand, merges.epoch),
            _layouts=self.layouts,
            _bias=lambda: self._bias_of(node, merges, block),
        )
        return self.method.reduce(reducing)

    def _bias_of(self, node: fx.Node, merges: Merges, block: Block) -> fx.Node | None:
        """The position bias that a block's fused attention adds to the scores of tokens now."""
        outcome = self.outcomes.get(block.attention.result)
        if not isinstance(outcome, Attended):
            return None
        return self._position_bias(node, outcome, merges, merges.epoch)

    # ---- merged before, unmerged after -----------------------------------------------------

    def _at_epoch(self, node: fx.Node, epoch: int) -> fx.Node:
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

    def _unmerged(self, reader: fx.Node, operand: fx.Node) -> fx.Node:
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
            return self._copy_with(node, {a: self.whole[a] for a in needs(node)})

        return answered(operand, self.whole, needs, answer)

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

    # ---- making nodes ----------------------------------------------------------------------

    def _resize(self, copy: fx.Node, outcome: Carried, merges: Merges, epoch: int) -> None:
        at = SIZED[copy.target]  # type: ignore[index]
        sizes = list(copy.args[at])  # type: ignore[arg-type]
        length = merges.length(outcome.layout, epoch)
        for entry, axis in outcome.sizes:
            if isinstance(size := axis.before * length * axis.after, int):
                sizes[entry] = size
            elif all(s != -1 for i, s in enumerate(sizes) if i != entry):
                sizes[entry] = -1
            elif sizes[entry] != -1:
                raise self.writer.error(
                    copy, "a view folds batch and tokens and leaves a size open"
                )
        copy.update_arg(at, sizes)

    def _drop_dead(self, keep: Collection[fx.Node | None]) -> None:
        # A dropped mask leaves its arithmetic behind; what the captured graph already held
        # for its effects (assertions) stays.
        for node in reversed(self.writer.graph.nodes):
            unused = node.op == "call_function" and not node.users
            effects = node.is_impure() and not _draws_nothing(node)
            if unused and not effects and node not in keep:
                self.writer.graph.erase_node(node)


def _is_referenced(reduction: Reduction) -> bool:
    chosen, others = reduction.chosen, (reduction.weight, reduction.size, reduction.holds)
    if chosen is None or chosen.target not in MATCHES or "kth" in chosen.args:
        return False
    return others == (None, None, None)


def _draws_nothing(node: fx.Node) -> bool:
    """Fused attention and dropout, which fx takes for impure as they may draw random numbers."""
    dropout = node.target in _DROPOUTS and node.args[2] is False
    return node.target is FUSED or dropout


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _dump(module: fx.GraphModule, name: str) -> None:
    """Writes a readable graph to ``TOMEPASS_DUMP``, numbered, if that is set."""
    folder = os.environ.get("TOMEPASS_DUMP")
    if not folder:
        return
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    number = len(list(path.glob("*.txt")))
    text = module.print_readable(print_output=False)
    (path / f"{number:02d}_{name}.txt").write_text(text)
