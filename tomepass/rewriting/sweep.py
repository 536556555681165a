"""Rewrites a captured graph in one pass from its inputs to its outputs.

Every node is copied into a new graph. What its operands hold decides how: nodes without tokens are
copied as they are, attention gets token sizes, tables are merged, and before nodes that depend on
positions tokens are unmerged. Inserted nodes are ``tome::`` operators. Every node whose operands
changed is run again on fake tensors and its shape compared with the plan, so that ``meta["val"]``
is right and a wrong number of tokens raises an error.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from tomepass.graphs.canonical import CanonicalGraph
from tomepass.graphs.nodes import FUSED, shape_of
from tomepass.methods.reduction import Reduction
from tomepass.ops.choices import MATCHES
from tomepass.ops.merging.weighted_mean import weighted_mean
from tomepass.planning.streams import Planned
from tomepass.reading.attention import ignores_first
from tomepass.reading.layouts import (
    SIZED,
    Attended,
    Averaged,
    Carried,
    Contracted,
    Divided,
    Joined,
    Positional,
    Side,
    Taken,
    Weighed,
)
from tomepass.reading.mismatch import Mismatch
from tomepass.reading.structure import Block
from tomepass.reading.weights import fused_heads
from tomepass.rewriting.attending import Attending
from tomepass.rewriting.carrying import beside
from tomepass.rewriting.epochs import Merges
from tomepass.rewriting.merging import Merging
from tomepass.rewriting.rewritten import Rewritten, dump
from tomepass.rewriting.values import Values
from tomepass.rewriting.writer import Writer

aten = torch.ops.aten

_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default)

_PADDED = "it counts padding, which the stream's attentions leave out"

_MIXED = "it combines tokens from before a merge with tokens from after it"


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
    dump(captured.module, "before")
    sweep = _Sweep(captured, planned, keep_short=outputs == "merged", keep_sizes=sizes)
    rewritten = sweep.run()
    dump(rewritten.module, "after")
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
        self.values = Values(self.writer)
        self.new, self.epoch = self.values.new, self.values.epoch
        self.layouts, self.stream_of = self.values.layouts, self.values.stream_of
        self.carrying = self.values.carrying
        self.attending = Attending(planned.method, self.carrying)
        self.merging = Merging(planned.method, self.values, self.attending)
        self.unmerged: list[Mismatch] = []
        self.returned: dict[str, str] = {}
        holes = planned.method.holes
        self.streams = [Merges(p, masked=holes or p.padding is not None) for p in planned.streams]
        self.outcomes: dict[fx.Node, Any] = {}
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
                merges, block = self.merge_points[node]
                attended = self.outcomes.get(block.attention.result)
                self.merging.merge(node, merges, block, attended)
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
            return self.values.copy(node)
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

    # ---- one handler an outcome ------------------------------------------------------------

    def _carry(self, node: fx.Node, outcome: Carried, merges: Merges) -> fx.Node:
        holders = [a for a in node.all_input_nodes if a in self.layouts]
        epoch = max(self.epoch[a] for a in holders)
        if node not in merges.planned.inner:
            if any(self.epoch[a] < epoch for a in holders):
                return self._unmerge_first(node, Positional(_MIXED))
            if outcome.sides:
                return self._unmerge_first(node, Positional(beside(outcome.sides[0])))
        inputs = {a: self.values.at_epoch(a, epoch) for a in holders}
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
            bias = self.attending.log(node, size, scores, layout.keys.dim, fold)
            scores = self.writer.emit(node, aten.add.Tensor, scores, bias)
        copy = self.writer.graph.node_copy(node, lambda a: scores if a is operand else self.new[a])
        self.writer.execute(copy)
        self.epoch[node] = epoch
        self.writer.compare(node, copy, outcome.layout, merges.length(layout, epoch))
        return copy

    def _contract(self, node: fx.Node) -> fx.Node:
        holders = [a for a in node.all_input_nodes if a in self.layouts]
        epoch = max(self.epoch[a] for a in holders)
        return self.values.copy_with(node, {a: self.values.at_epoch(a, epoch) for a in holders})

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
        return self.values.copy_with(node, {a: self.values.unmerged(node, a) for a in merged})

    def _attend(self, node: fx.Node, outcome: Attended) -> fx.Node:
        operands: list[fx.Node] = list(node.args[:3])  # type: ignore[arg-type]
        held = [a for a in operands if a in self.layouts]
        merges = self.stream_of[held[-1]]
        if not any(block.r for block in merges.planned.plan.blocks):
            return self.values.copy(node)
        epoch = max(self.epoch[a] for a in held)
        if epoch and outcome.padding is not merges.planned.padding:
            return self._unmerge_first(node, Positional(_PADDED))
        if node not in merges.planned.inner:
            if any(self.epoch[a] < epoch for a in held):
                return self._unmerge_first(node, Positional(_MIXED))
            if outcome.bias is not None and epoch:
                return self._unmerge_first(node, Positional(beside(Side(outcome.bias, "bias"))))
        q, k, v = (self.values.at_epoch(a, epoch) if a in held else self.new[a] for a in operands)
        if not epoch:
            copy = self.attending.fused(node, outcome, merges, epoch, (q, k, v))
        else:
            heads = fused_heads(shape_of(operands[1]), outcome.keys)
            apart = [self.writer.heads_apart(node, x, heads) for x in (q, k, v)]
            attending = self.attending
            attend = attending.softly if self.method.soft else attending.fused
            copy = attend(node, outcome, merges, epoch, (apart[0], apart[1], apart[2]))
            if heads is not None:
                shape = [-1, *shape_of(q)[1:-1], shape_of(v)[-1]]
                copy = self.writer.emit(node, aten.reshape.default, copy, shape)
        if outcome.layout is not None:
            self.epoch[node] = epoch
            self.writer.compare(node, copy, outcome.layout, merges.length(outcome.layout, epoch))
        return copy

    def _output(self, node: fx.Node) -> None:
        def left(operand: fx.Node) -> fx.Node:
            epoch = self.epoch.get(operand, 0)
            if epoch:
                layout = self.layouts[operand]
                short, full = self.stream_of[operand].length(layout, epoch), len(layout.positions)
                how = f"merged, {short}" if self.keep_short else f"unmerged from {short} to {full}"
                self.returned[operand.name] = f"returned {how} tokens"
            return self.new[operand] if self.keep_short else self.values.unmerged(node, operand)

        self.writer.graph.node_copy(node, left)

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
