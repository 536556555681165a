"""Stage 5: one forward sweep over a copy of the graph.

Inserted nodes are ``tome::`` operators. Every touched node is re-executed on fake tensors, and
its shape compared with the plan: metadata is never stale and a wrong count never silent.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from tomepass.axis import argument, same, shape_of, target_name
from tomepass.capture import CanonicalGraph, source_line
from tomepass.config import ToMe
from tomepass.errors import TomeError
from tomepass.ops.log_size import log_size
from tomepass.ops.match import match
from tomepass.ops.merge import merge, merge_size
from tomepass.ops.unmerge import compose, narrow_source, unmerge
from tomepass.ops.weighted_mean import weighted_mean
from tomepass.planning import Planned, PlannedStream
from tomepass.structure import Block
from tomepass.tokens import SIZED, Attended, Averaged, Carried, Layout, Positional, Taken

aten = torch.ops.aten


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph.

    Args:
        module: the graph, callable like the one it was made from.
        source: the name of the node that maps original tokens of the first stream to final
            ones, None where nothing merges.
        unmerged: why and where tokens are unmerged before a reader, for the report.
        renamed: for each node of the captured graph, the node that stands for it now.
    """

    module: fx.GraphModule
    source: str | None
    unmerged: tuple[str, ...]
    renamed: dict[str, str]


def rewrite(captured: CanonicalGraph, planned: Planned, *, outputs: str = "original") -> Rewritten:
    """Inserts the plan's merges. The given graph is left as it is.

    Args:
        outputs: ``"original"`` unmerges token sequences that the model returns, ``"merged"``
            returns them short.

    Raises:
        TomeError: if a value cannot be carried through a merge.
    """
    _dump(captured.module, "before")
    sweep = _Sweep(captured, planned, keep_short=outputs == "merged")
    rewritten = sweep.run()
    _dump(rewritten.module, "after")
    return rewritten


@dataclass
class _Merges:
    """The merges done so far in one stream; epoch e is the sequence after e of them."""

    planned: PlannedStream
    tokens: list[int] = field(default_factory=list)
    assigns: list[fx.Node] = field(default_factory=list)
    sizes: list[fx.Node | None] = field(default_factory=lambda: [None])
    sources: list[fx.Node | None] = field(default_factory=lambda: [None])

    def __post_init__(self) -> None:
        self.tokens.append(self.planned.plan.tokens)

    @property
    def protected(self) -> tuple[int, ...]:
        return self.planned.plan.protected

    def length(self, layout: Layout, epoch: int) -> int:
        """Tokens a value with this layout holds at an epoch."""
        gone = self.tokens[0] - len(layout.positions)
        return self.tokens[epoch] - gone

    def indices(self, positions: tuple[int, ...], epoch: int, within: Layout) -> list[int]:
        """Where original positions stand in a merged value that covers ``within``."""
        if epoch == 0:
            return [within.positions.index(p) for p in positions]
        held = [p for p in self.protected if p in within.positions]
        indices = [held.index(p) for p in positions if p in held]
        if len(indices) < len(positions):
            indices += range(len(held), self.length(within, epoch))
        return indices


class _Sweep:
    def __init__(self, captured: CanonicalGraph, planned: Planned, *, keep_short: bool) -> None:
        self.captured = captured
        self.method: ToMe = planned.method
        self.keep_short = keep_short
        self.fake_mode = captured.fake_mode
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.epoch: dict[fx.Node, int] = {}
        self.touched: set[fx.Node] = set()
        self.unmerged: list[str] = []
        self.streams = [_Merges(p) for p in planned.streams]
        self.stream_of: dict[fx.Node, _Merges] = {}
        self.outcomes: dict[fx.Node, Any] = {}
        self.layouts: dict[fx.Node, Layout] = {}
        self.merge_points: dict[fx.Node, tuple[_Merges, Block]] = {}
        self.attentions: dict[fx.Node, _Merges] = {}
        for merges in self.streams:
            self._enlist(merges)

    def _enlist(self, merges: _Merges) -> None:
        flow, stream = merges.planned.flow, merges.planned.stream
        if shared := self.layouts.keys() & flow.layouts.keys():
            raise self._error(next(iter(shared)), "two residual streams meet here")
        self.layouts.update(flow.layouts)
        self.outcomes.update(flow.outcomes)
        self.stream_of.update(dict.fromkeys(flow.layouts, merges))
        for block, plan in zip(stream.blocks, merges.planned.plan.blocks, strict=True):
            if plan.r:
                self.merge_points[block.merge_at] = (merges, block)

    # ---- the sweep -------------------------------------------------------------------------

    def run(self) -> Rewritten:
        for node in self.captured.graph.nodes:
            if node.op == "output":
                self._output(node)
                continue
            self.new[node] = self._node(node)
            if node in self.layouts and node not in self.epoch:
                self.epoch[node] = 0
            if node in self.merge_points:
                self._merge(node)
        self._drop_dead_masks()
        self.graph.lint()
        module = fx.GraphModule(self.captured.module, self.graph)
        module.meta.update(self.captured.module.meta)
        source = self.streams[0].sources[-1] if self.streams else None
        live = set(self.graph.nodes)
        return Rewritten(
            module,
            source.name if source is not None and source in live else None,
            tuple(self.unmerged),
            {old.name: new.name for old, new in self.new.items() if new in live},
        )

    def _node(self, node: fx.Node) -> fx.Node:
        outcome = self.outcomes.get(node)
        holders = [a for a in node.all_input_nodes if self.epoch.get(a, 0) > 0]
        if isinstance(outcome, Attended):
            return self._attend(node, outcome)
        if outcome is None or not holders:
            return self._copy(node)
        merges = self.stream_of[holders[0]]
        handle: Callable[..., fx.Node] = {
            Carried: self._carry,
            Taken: self._take,
            Averaged: self._average,
            Positional: self._unmerge_first,
        }[type(outcome)]
        return handle(node, outcome, merges)

    def _copy(self, node: fx.Node) -> fx.Node:
        copy = self.graph.node_copy(node, self.new.__getitem__)
        if any(a in self.touched for a in copy.all_input_nodes):
            self._execute(copy)
        return copy

    # ---- one handler an outcome ------------------------------------------------------------

    def _carry(self, node: fx.Node, outcome: Carried, merges: _Merges) -> fx.Node:
        if outcome.sides:
            raise self._error(
                node,
                f"{outcome.sides[0].name} holds one row a token, does not come from the tokens, "
                "and meets them after a merge (a rotary table or a position bias): carrying it "
                "through a merge is not supported",
            )
        holders = [a for a in node.all_input_nodes if a in self.layouts]
        epoch = max(self.epoch[a] for a in holders)
        inputs = {a: self._at_epoch(a, epoch) for a in holders}
        copy = self.graph.node_copy(node, lambda a: inputs.get(a, self.new[a]))
        length = merges.length(outcome.layout, epoch)
        if outcome.size_at is not None:
            self._resize(copy, outcome, length)
        self._execute(copy)
        self.epoch[node] = epoch
        self._compare(node, copy, outcome.layout, length)
        return copy

    def _take(self, node: fx.Node, outcome: Taken, merges: _Merges) -> fx.Node:
        operand = node.all_input_nodes[0]
        epoch = self.epoch[operand]
        indices = merges.indices(outcome.positions, epoch, self.layouts[operand])
        x = self.new[operand]
        if outcome.drops:
            taken = self._emit(node, aten.select.int, x, outcome.dim, indices[0])
        else:
            taken = self._slices(node, x, outcome.dim, indices)
        if outcome.layout is not None:
            self.epoch[node] = epoch
        return taken

    def _average(self, node: fx.Node, outcome: Averaged, merges: _Merges) -> fx.Node:
        operand = node.all_input_nodes[0]
        layout, epoch = self.layouts[operand], self.epoch[operand]
        if not layout.plain:
            raise self._error(node, "a mean over tokens that are not batch first")
        size = merges.sizes[epoch]
        assert size is not None
        indices = merges.indices(layout.positions, epoch, _whole(merges))
        if len(indices) < merges.tokens[epoch]:
            size = self._slices(node, size, 1, indices)
        x = self.new[operand]
        mean = self._emit(node, weighted_mean, x, size, outcome.dim, outcome.keepdim)
        dtype = node.kwargs.get("dtype")
        return mean if dtype is None else self._emit(node, aten.to.dtype, mean, dtype)

    def _unmerge_first(self, node: fx.Node, outcome: Positional, merges: _Merges) -> fx.Node:
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            raise self._error(node, f"{target_name(node)} changes unmerged tokens in place")
        self.unmerged.append(f"{node.name}: {outcome.reason} ({source_line(node) or 'no source'})")
        inputs = {
            a: self._unmerged(node, a) for a in node.all_input_nodes if self.epoch.get(a, 0) > 0
        }
        copy = self.graph.node_copy(node, lambda a: inputs.get(a, self.new[a]))
        self._execute(copy)
        return copy

    def _attend(self, node: fx.Node, outcome: Attended) -> fx.Node:
        query, key, value = node.args[:3]
        merges = self.stream_of[key]  # type: ignore[index]
        if not any(block.r for block in merges.planned.plan.blocks):
            return self._copy(node)
        epoch = max(self.epoch[a] for a in (query, key, value))  # type: ignore[index]
        q, k, v = (self._at_epoch(a, epoch) for a in (query, key, value))  # type: ignore[arg-type]
        size = merges.sizes[epoch] if self.method.prop_attn else None
        bias = None if size is None else self._emit(node, log_size, size, q)
        kwargs = {n: a for n, a in node.kwargs.items() if n != "attn_mask"}
        rest = node.args[4:]
        copy = self._emit(node, node.target, q, k, v, bias, *rest, **kwargs)
        self.epoch[node] = epoch
        self._compare(node, copy, outcome.layout, merges.length(outcome.layout, epoch))
        return copy

    def _output(self, node: fx.Node) -> None:
        def restored(operand: fx.Node) -> fx.Node:
            if self.keep_short or not self.epoch.get(operand, 0):
                return self.new[operand]
            return self._unmerged(node, operand)

        self.graph.node_copy(node, restored)

    # ---- merging and back ------------------------------------------------------------------

    def _merge(self, node: fx.Node) -> None:
        merges, block = self.merge_points[node]
        plan = merges.planned.plan.blocks[block.index]
        epoch = self.epoch[node]
        assert merges.tokens[epoch] == plan.tokens_in, "the plan and the sweep disagree"
        held = merges.protected if epoch == 0 else tuple(range(len(merges.protected)))
        size = merges.sizes[epoch]
        key = self._at_epoch(block.key, epoch)
        assign = self._emit(node, match, key, plan.r, list(held))
        merges.assigns.append(assign)
        merges.tokens.append(plan.tokens_out)
        merges.sizes.append(self._emit(node, merge_size, size, assign, plan.tokens_out))
        merges.sources.append(self._emit(node, compose, merges.sources[epoch], assign))
        merged = self._emit(node, merge, self.new[node], size, assign, plan.tokens_out)
        self.new[node] = merged
        self.epoch[node] = epoch + 1
        self._compare(node, merged, self.layouts[node], plan.tokens_out)

    def _at_epoch(self, node: fx.Node, epoch: int) -> fx.Node:
        """The value of a token holder, merged as often as the stream had been at ``epoch``."""
        merges, layout = self.stream_of[node], self.layouts[node]
        x = self.new[node]
        for e in range(self.epoch[node], epoch):
            if not layout.plain or len(layout.positions) != merges.tokens[0]:
                raise self._error(node, "a value from before a merge meets the tokens after it")
            if layout.tokens.dim != 1 or len(shape_of(node)) != 3:
                raise self._error(node, "a value from before a merge meets the tokens after it")
            tokens = merges.tokens[e + 1]
            x = self._emit(node, merge, x, merges.sizes[e], merges.assigns[e], tokens)
        return x

    def _unmerged(self, reader: fx.Node, operand: fx.Node) -> fx.Node:
        layout, epoch = self.layouts[operand], self.epoch[operand]
        merges = self.stream_of[operand]
        source = merges.sources[epoch]
        assert source is not None
        if not layout.plain:
            raise self._error(
                operand,
                f"{target_name(reader)} needs the original tokens, but they are folded together "
                "with the batch or not batch first",
            )
        if removed := [p for p in merges.protected if p not in layout.positions]:
            gone = [merges.protected.index(p) for p in removed]
            source = self._emit(reader, narrow_source, source, list(layout.positions), gone)
        return self._emit(reader, unmerge, self.new[operand], source, layout.tokens.dim)

    # ---- making nodes ----------------------------------------------------------------------

    def _slices(self, node: fx.Node, x: fx.Node, dim: int, indices: list[int]) -> fx.Node:
        """``x`` at ascending indices: a slice a run, concatenated."""
        runs: list[list[int]] = []
        for index in indices:
            if runs and index == runs[-1][1]:
                runs[-1][1] += 1
            else:
                runs.append([index, index + 1])
        parts = [self._emit(node, aten.slice.Tensor, x, dim, start, end) for start, end in runs]
        return parts[0] if len(parts) == 1 else self._emit(node, aten.cat.default, parts, dim)

    def _resize(self, copy: fx.Node, outcome: Carried, length: int) -> None:
        at = SIZED[copy.target]  # type: ignore[index]
        sizes = list(copy.args[at])  # type: ignore[arg-type]
        assert outcome.size_at is not None
        entry, axis = outcome.size_at, outcome.layout.tokens
        if same(axis.before, 1) and isinstance(axis.after, int):
            sizes[entry] = length * axis.after
        elif all(s != -1 for i, s in enumerate(sizes) if i != entry):
            sizes[entry] = -1
        elif sizes[entry] != -1:
            raise self._error(copy, "a view folds batch and tokens and leaves another size open")
        copy.update_arg(at, sizes)

    def _emit(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        for name in ("stack_trace", "nn_module_stack"):
            if name in like.meta:
                node.meta[name] = like.meta[name]
        self._execute(node)
        return node

    def _execute(self, node: fx.Node) -> None:
        """Runs a node on the fake values of its inputs: its metadata is what it computes."""
        if node.op != "call_function":
            raise self._error(node, f"cannot follow tokens through a {node.op}")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda a: a.meta["val"])
        try:
            with self.fake_mode:
                node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as error:
            raise self._error(
                node, f"{target_name(node)} does not fit the merged tokens: {error}"
            ) from error
        node.meta.pop("tensor_meta", None)
        self.touched.add(node)

    def _compare(self, node: fx.Node, copy: fx.Node, layout: Layout, length: int) -> None:
        axis, shape = layout.tokens, shape_of(copy)
        if not same(shape[axis.dim], axis.before * length * axis.after):
            raise self._error(
                node, f"expected {length} tokens on dimension {axis.dim}, got {list(shape)}"
            )

    def _drop_dead_masks(self) -> None:
        # A dropped mask leaves its arithmetic behind; what the captured graph already held
        # for its effects (assertions) stays.
        for node in reversed(self.graph.nodes):
            if node.op == "call_function" and not node.users and not node.is_impure():
                self.graph.erase_node(node)

    def _error(self, node: fx.Node, reason: str) -> TomeError:
        return TomeError(reason, node=node.name, source=source_line(node))


def _whole(merges: _Merges) -> Layout:
    return merges.planned.layout


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
