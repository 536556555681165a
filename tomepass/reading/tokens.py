"""Follows the tokens of a stream from node to node, and says what each reader does with them.

The graph is read as it was captured. Every node that tokens reach gets an outcome (``layouts.py``):
the result holds the same tokens, some positions are taken out, tokens are averaged, tokens attend
to each other, or the node depends on positions, so that tokens have to be unmerged before it.
Rewriting follows these outcomes and decides nothing about operators itself.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from tomepass.capture.idle_masks import hides_nothing
from tomepass.graphs.canonical import CanonicalGraph
from tomepass.graphs.nodes import (
    FUSED,
    PRODUCTS,
    argument,
    dimensions,
    shape_of,
    target_name,
)
from tomepass.reading.attention import SOFTMAXES, Attention, ignores_first, operands
from tomepass.reading.axis import move, sums_over
from tomepass.reading.layouts import (
    Attended,
    Averaged,
    Carried,
    Contracted,
    Divided,
    Joined,
    Layout,
    Masked,
    Outcome,
    Positional,
    Side,
    Taken,
    Weighed,
    has_rows,
    length_along,
    open_sizes,
)
from tomepass.reading.masks import bias_factor, hides_all, is_padding, is_position_bias
from tomepass.reading.weights import (
    SCALINGS,
    SPLITS,
    heads_apart,
    homogeneous,
    is_of_heads,
    softmax,
)

aten = torch.ops.aten

# Their second argument gives a dtype alone.
_DTYPE_DONORS = (aten.to.other, aten.type_as.default)


_SUMS = (aten.add.Tensor, aten.sub.Tensor)

_MASKED = (
    "tomepass merges encoders; call the model without a mask, or leave it as it is if not every "
    "token may see every other"
)


@dataclass(frozen=True)
class TokenFlow:
    """The result of following the tokens of one stream.

    Args:
        layouts: of every tensor that holds tokens which may merge.
        outcomes: of every node that reads such a tensor.
        held: layouts of tensors that hold protected tokens alone, which no merge changes.
    """

    layouts: dict[fx.Node, Layout]
    outcomes: dict[fx.Node, Outcome]
    held: dict[fx.Node, Layout] = field(default_factory=dict)


def follow_tokens(
    captured: CanonicalGraph,
    entry: fx.Node,
    layout: Layout,
    protected: tuple[int, ...],
    until: fx.Node | None = None,
) -> TokenFlow:
    """Follows the tokens of ``entry`` forward to the outputs, or to ``until``."""
    flow = TokenFlow({entry: layout}, {})
    analysis = _Analysis(captured, flow, frozenset(protected), {entry})
    node = entry.next
    while node.op != "root":
        if node.op != "output":
            analysis.visit(node)
        if node is until:
            break
        node = node.next
    return flow


def attends(attention: Attention, flow: TokenFlow) -> Layout | Positional | None:
    """The layout of an attention's result, or the reason why it does not see all tokens.

    None where it is no attention over the tokens of this stream.
    """
    result = flow.outcomes.get(attention.result)
    if isinstance(result, Attended):
        return result.layout
    for node in (*attention.scores, attention.result):
        if isinstance(outcome := flow.outcomes.get(node), Positional):
            return outcome
    weighed = flow.outcomes.get(attention.weights)
    if isinstance(weighed, Weighed) and weighed.layout.columns is not None:
        return flow.layouts.get(attention.result)
    return None


@dataclass(frozen=True)
class _Analysis:
    captured: CanonicalGraph
    flow: TokenFlow
    protected: frozenset[int]
    reached: set[fx.Node]  # all that depends on the stream, with or without tokens of it

    def visit(self, node: fx.Node) -> None:
        flow = self.flow
        if not any(a in self.reached for a in node.all_input_nodes):
            return
        self.reached.add(node)
        if any(a in flow.layouts for a in node.all_input_nodes):
            outcome = self._outcome(node)
            if outcome is not None:
                flow.outcomes[node] = outcome
                if (result := getattr(outcome, "layout", None)) is not None:
                    flow.layouts[node] = result
                if isinstance(outcome, Taken) and outcome.layout is None and not outcome.drops:
                    (operand,) = node.all_input_nodes
                    whole = flow.layouts[operand]
                    flow.held[node] = replace(whole, positions=outcome.positions)
        elif any(a in flow.held for a in node.all_input_nodes):
            self._keep_held(node)

    def _keep_held(self, node: fx.Node) -> None:
        """Follows protected tokens on their own, up to where they are joined to the others."""
        held = [a for a in node.all_input_nodes if a in self.flow.held]
        found = [self._moved(node, a, self.flow.held[a]) for a in held]
        if isinstance(first := found[0], Layout) and all(other == first for other in found):
            self.flow.held[node] = first

    def _outcome(self, node: fx.Node) -> Outcome | None:
        flow = self.flow
        if node.target is FUSED:
            return self._fused(node)
        holders = [a for a in node.all_input_nodes if a in flow.layouts]
        if node.target in _DTYPE_DONORS and holders != [node.args[0]]:
            if node.args[0] not in holders:
                return None
            holders = holders[:1]
        layout = flow.layouts[holders[0]]
        if node.target is operator.getitem:
            return self._piece(node, holders[0])
        if node.target is aten.sym_size.int:
            asked = int(node.args[1]) % len(shape_of(holders[0]))  # type: ignore[arg-type]
            if any(asked == axis.dim for axis in layout.axes):
                return Positional("the number of tokens is read as a number")
            return None
        if node.target in SOFTMAXES and (weighed := softmax(node, layout)) is not None:
            return weighed
        if node.target is aten.cat.default and (joined := self._joined(node)) is not None:
            return joined
        if len(holders) == 2 and node.target in (*PRODUCTS, aten.mm.default):
            return self._product(node)
        if len(holders) == 1 and (read := self._read(node, holders[0], layout)) is not None:
            return read
        return self._carried(node, holders)

    # ---- readers of the token dimension itself ---------------------------------------------

    def _read(self, node: fx.Node, operand: fx.Node, layout: Layout) -> Outcome | None:
        """The outcome of a slice, select, split or mean; None for every other operator."""
        if not layout.tokens.whole or operand is not node.args[0]:
            return None
        dim, ndim = layout.tokens.dim, len(shape_of(operand))
        if layout.weights or layout.columns is not None:
            pooled = layout.weights and layout.columns is None
            if pooled and node.target is aten.sum.dim_IntList:
                summed = dimensions(argument(node, 1, "dim"), ndim) == (dim,)
                return Contracted() if summed else None
            return None
        if node.target is aten.slice.Tensor and _along(node, 1, ndim) == (dim,):
            window = [argument(node, i, n) for i, n in ((2, "start"), (3, "end"), (4, "step"))]
            if not all(isinstance(w, (int, type(None))) for w in window):
                return Positional("tokens are sliced at a position only known when it runs")
            return self._taken(node, layout, layout.positions[slice(*window)], drops=False)
        if node.target is aten.select.int and _along(node, 1, ndim) == (dim,):
            index = node.args[2]
            if not isinstance(index, int):
                return Positional("a token is selected at a position only known when it runs")
            return self._taken(node, layout, (layout.positions[index],), drops=True)
        if node.target in SPLITS and _along(node, 2, ndim) == (dim,):
            return self._divided(node, layout)
        means = node.target is aten.mean.dim and layout.positions
        if means and dimensions(argument(node, 1, "dim"), ndim) == (dim,):
            return Averaged(dim, bool(argument(node, 2, "keepdim", False)))
        return None

    def _taken(
        self, node: fx.Node, layout: Layout, taken: tuple[int, ...], *, drops: bool
    ) -> Outcome:
        rest = set(layout.positions) - self.protected
        # None at all is what a model without tokens of its own cuts off in front.
        if not taken or self.protected.issuperset(taken):
            return Taken(taken, layout.tokens.dim, None, drops)
        if rest.issubset(taken) and not drops and list(taken) == sorted(taken):
            return Taken(taken, layout.tokens.dim, replace(layout, positions=taken), drops)
        return Positional(f"{target_name(node)} takes some of the mergeable tokens by position")

    def _divided(self, node: fx.Node, layout: Layout) -> Outcome:
        counts = [value.shape[layout.tokens.dim] for value in node.meta["val"]]
        if not all(isinstance(count, int) for count in counts):
            return Positional("tokens are split at a position only known when it runs")
        pieces: list[tuple[int, ...]] = []
        start = 0
        for count in counts:
            pieces.append(layout.positions[start : start + count])
            start += count
            taken = self._taken(node, layout, pieces[-1], drops=False)
            if isinstance(taken, Positional):
                return taken
        return Divided(tuple(pieces), layout)

    def _piece(self, node: fx.Node, operand: fx.Node) -> Outcome:
        layout, source = self.flow.layouts[operand], self.flow.outcomes.get(operand)
        if not isinstance(source, Divided):
            return Carried(layout)
        index = int(node.args[1])  # type: ignore[arg-type]
        return self._taken(node, layout, source.pieces[index], drops=False)

    def _joined(self, node: fx.Node) -> Outcome | None:
        """A cat of protected tokens and the others. None if it is along another dimension."""
        flow, parts = self.flow, list(node.args[0])  # type: ignore[arg-type]
        along = _along(node, 1, len(shape_of(node)))
        holder = next(p for p in parts if p in flow.layouts)
        first = flow.layouts[holder]
        if along != (first.tokens.dim,) or first.columns is not None:
            return None
        layouts = [flow.layouts.get(p) or flow.held.get(p) for p in parts]
        positions: list[int] = []
        for layout in layouts:
            if layout is None or replace(layout, positions=first.positions) != first:
                return Positional("a cat puts other tokens beside the stream's own")
            positions += layout.positions
        ascending = positions == sorted(set(positions))
        if not (ascending and first.tokens.whole) or sum(p in flow.layouts for p in parts) > 1:
            return Positional("a cat puts tokens together in another order")
        whole = replace(first, positions=tuple(positions))
        return Joined(whole, tuple(layout.positions for layout in layouts if layout))

    # ---- attention -------------------------------------------------------------------------

    def _fused(self, node: fx.Node) -> Outcome:
        query, key, value = (self.flow.layouts.get(n) for n in node.args[:3])  # type: ignore[arg-type]
        if key is None or key != value or query not in (None, key):
            return Positional("this attention is not among the stream's own tokens")
        if not heads_apart(node, key):
            return Positional(
                "expected attention over [B, H, N, D] with all tokens on N, "
                f"got {list(shape_of(node.args[1]))}"  # type: ignore[arg-type]
            )
        if argument(node, 5, "is_causal", False):
            return Masked(
                "causal attention: merging would mix a token with later ones",
                "tomepass merges encoders; a decoder is left alone",
            )
        mask, ndim = argument(node, 3, "attn_mask"), len(shape_of(node))
        if not isinstance(mask, fx.Node) or hides_nothing(mask):
            return Attended(query, key)
        if query is not None and is_of_heads(mask, node) and is_position_bias(mask, self.captured):
            return Attended(query, key, mask)
        if query is not None and key.plain and mask not in self.reached and is_padding(mask, ndim):
            return Attended(query, key, padding=mask)
        return _hidden(mask)

    def _product(self, node: fx.Node) -> Outcome:
        """The outcome of multiplying two tensors that hold tokens: scores, or weights by values."""
        pair = operands(node)
        if pair is None or pair[0] is pair[1]:
            return Positional("a product of more or less than two tensors of tokens")
        if node.target is aten.baddbmm.default and not ignores_first(node):
            return Positional("a product that adds a bias of its own")
        left, right = pair
        a, b = self.flow.layouts.get(left), self.flow.layouts.get(right)
        if a is None or b is None or b.columns is not None or b.weights:
            return Positional(f"{target_name(node)} multiplies tokens in a way not understood")
        if a.positions != b.positions:
            return Positional("a product of different selections of tokens")
        sums = sums_over(node, left, a.keys) and sums_over(node, right, b.tokens)
        if a.weights and sums and a.keys.whole and b.tokens.whole:
            if a.columns is None:
                return Contracted()
            moved = self._moved(node, left, replace(a, columns=None, weights=False))
            return moved if isinstance(moved, Positional) else Carried(moved)
        if a.weights or a.columns is not None:
            return Positional("attention scores are multiplied by something else than values")
        rows, columns = self._moved(node, left, a), self._moved(node, right, b)
        if isinstance(rows, Positional):
            return rows
        if isinstance(columns, Positional):
            return columns
        if rows.batch != columns.batch:
            return Positional("a product of tokens of different images")
        return Carried(replace(rows, columns=columns.tokens))

    # ---- everything else -------------------------------------------------------------------

    def _carried(self, node: fx.Node, holders: list[fx.Node]) -> Outcome:
        results: list[Layout] = []
        for holder in holders:
            moved = self._moved(node, holder, self.flow.layouts[holder])
            if isinstance(moved, Positional):
                return moved
            results.append(moved)
        weights = [h for h, r in zip(holders, results, strict=True) if r.weights]
        if weights and not (len(weights) == 1 and homogeneous(node, weights[0])):
            return Positional(f"{target_name(node)} changes what attention weights sum to")
        layout = replace(results[0], weights=bool(weights))
        if layout.columns is not None and any(map(hides_all, node.args)):
            # A row of these alone would forget the sizes: too large to have log(size) added.
            return _hidden(node)
        if any(replace(r, weights=layout.weights) != layout for r in results):
            return Positional(f"{target_name(node)} combines tokens laid out differently")
        sides = self._sides(node, layout)
        if isinstance(sides, Positional):
            return sides
        return Carried(layout, tuple(open_sizes(node, holders[0], layout)), sides)

    def _moved(self, node: fx.Node, operand: fx.Node, layout: Layout) -> Layout | Positional:
        """The layout of the result for one of the operands that hold tokens."""
        axes = []
        for axis in layout.axes:
            moved = move(node, operand, axis, len(layout.positions))
            if isinstance(moved, str):
                return Positional(moved)
            axes.append(moved)
        batch = move(node, operand, layout.batch, length_along(operand, layout.batch))
        if isinstance(batch, str):
            return Positional(f"along the batch, {batch}")
        columns = axes[1] if len(axes) > 1 else None
        return replace(layout, tokens=axes[0], batch=batch, columns=columns)

    def _sides(self, node: fx.Node, layout: Layout) -> tuple[Side, ...] | Positional:
        """Operands that hold no tokens of the stream but have one row for each token."""
        found: list[Side] = []
        for operand in node.all_input_nodes:
            if operand in self.flow.layouts or not has_rows(node, operand, layout):
                continue
            if operand in self.reached:
                found.append(Side(operand, "read"))
                continue
            if layout.columns is not None:
                if node.target is aten.add.Tensor and hides_nothing(operand):
                    found.append(Side(operand, "nothing"))
                    continue
                factor = bias_factor(node, operand) if node.target in _SUMS else None
                if factor is None or not is_position_bias(operand, self.captured):
                    return _hidden(operand)
                found.append(Side(operand, "bias", factor))
            elif node.target in _SUMS:
                found.append(Side(operand, "mean"))
            elif node.target in SCALINGS:
                found.append(Side(operand, "kept"))
            else:
                return Positional(
                    f"{target_name(node)} combines the tokens with rows that are not made from them"
                )
        return tuple(found)


def _hidden(mask: fx.Node) -> Masked:
    return Masked(
        f"attention mask {mask.name} is not provably all true: it may be causal, a padding "
        "mask or a position bias that depends on the input",
        _MASKED,
    )


def _along(node: fx.Node, index: int, ndim: int) -> tuple[int, ...]:
    return dimensions(argument(node, index, "dim", 0), ndim)
