"""Stage 3: which dimension carries the tokens, node by node, and what each reader needs.

The analysis runs on the graph as captured. Every node that the tokens reach gets an outcome:
carried on, some positions taken, averaged, attended, or read by position, which means
"unmerge first". The rewrite follows the outcomes; it decides nothing about operators itself.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from tomepass.axis import (
    Axis,
    Size,
    argument,
    dimensions,
    is_pointwise,
    move,
    same,
    shape_of,
    target_name,
)
from tomepass.constants import hides_nothing
from tomepass.structure import ATTENTION

aten = torch.ops.aten

# Operators whose shape argument names the sizes of the result, and where it stands.
SIZED = {
    aten.view.default: 1,
    aten.reshape.default: 1,
    aten._unsafe_view.default: 1,
    aten.expand.default: 1,
    aten.unflatten.int: 2,
}


@dataclass(frozen=True)
class Layout:
    """How a value holds tokens.

    Args:
        tokens: the token axis.
        batch: the batch axis.
        positions: the original positions the value covers, ascending.
    """

    tokens: Axis
    batch: Axis
    positions: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """Batch first and no axis folded: what ``tome::`` operators take."""
        return self.tokens.whole and self.batch == Axis(0) and self.tokens.dim > 0


@dataclass(frozen=True)
class Carried:
    """The result holds the same tokens.

    Args:
        layout: of the result.
        size_at: which entry of the operator's shape argument counts the tokens.
        sides: operands, not made from tokens, that hold one row a token.
    """

    layout: Layout
    size_at: int | None = None
    sides: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Taken:
    """Some positions are read: protected ones alone, or all the others with them.

    Args:
        positions: original positions taken, ascending.
        dim: the token dimension of the operand.
        layout: of the result, None where only protected tokens are left.
        drops: the token dimension disappears (a select).
    """

    positions: tuple[int, ...]
    dim: int
    layout: Layout | None
    drops: bool


@dataclass(frozen=True)
class Averaged:
    """A mean over all tokens of the operand: weighted by size once tokens have merged."""

    dim: int
    keepdim: bool


@dataclass(frozen=True)
class Attended:
    """An attention among all tokens."""

    layout: Layout


@dataclass(frozen=True)
class Positional:
    """The operator reads tokens by position: unmerge first."""

    reason: str


@dataclass(frozen=True)
class Masked(Positional):
    """An attention in which not every token sees, or may not see, every other: unmerge first."""

    advice: str


Outcome = Carried | Taken | Averaged | Attended | Positional


@dataclass(frozen=True)
class TokenFlow:
    """The analysis of one stream: layouts of values and outcomes of readers."""

    layouts: dict[fx.Node, Layout]
    outcomes: dict[fx.Node, Outcome]


def follow_tokens(
    graph: fx.Graph,
    entry: fx.Node,
    layout: Layout,
    protected: tuple[int, ...],
    until: fx.Node | None = None,
) -> TokenFlow:
    """Follows the tokens of ``entry`` forward to the outputs, or to ``until``."""
    flow = TokenFlow({entry: layout}, {})
    node = entry.next
    while node.op != "root":
        if node.op != "output" and any(a in flow.layouts for a in node.all_input_nodes):
            outcome = _outcome(node, flow, frozenset(protected))
            if outcome is not None:
                flow.outcomes[node] = outcome
                if (result := getattr(outcome, "layout", None)) is not None:
                    flow.layouts[node] = result
        if node is until:
            break
        node = node.next
    return flow


def _outcome(node: fx.Node, flow: TokenFlow, protected: frozenset[int]) -> Outcome | None:
    if node.target is ATTENTION:
        return _attention(node, flow)
    holders = [a for a in node.all_input_nodes if a in flow.layouts]
    layout = flow.layouts[holders[0]]
    if node.target is operator.getitem:
        return Carried(layout)
    if node.target is aten.sym_size.int:
        if int(node.args[1]) % len(shape_of(holders[0])) == layout.tokens.dim:  # type: ignore[arg-type]
            return Positional("the number of tokens is read as a number")
        return None
    if len(holders) == 1 and (read := _read(node, holders[0], layout, protected)) is not None:
        return read
    return _carried(node, holders, flow)


def _read(
    node: fx.Node, operand: fx.Node, layout: Layout, protected: frozenset[int]
) -> Outcome | None:
    """Readers of the token dimension itself: slice, select, mean. None for all others."""
    if not layout.tokens.whole or operand is not node.args[0]:
        return None
    dim, count = layout.tokens.dim, len(layout.positions)
    ndim = len(shape_of(operand))
    if node.target is aten.slice.Tensor and dimensions(argument(node, 1, "dim", 0), ndim) == (dim,):
        window = [argument(node, i, n) for i, n in ((2, "start"), (3, "end"), (4, "step"))]
        if not all(isinstance(w, (int, type(None))) for w in window):
            return Positional("tokens are sliced at a position only known when it runs")
        taken = layout.positions[slice(*window)]
        return _taken(node, layout, taken, protected, drops=False)
    if node.target is aten.select.int and dimensions(node.args[1], ndim) == (dim,):
        index = node.args[2]
        if not isinstance(index, int):
            return Positional("a token is selected at a position only known when it runs")
        taken = (layout.positions[index],)
        return _taken(node, layout, taken, protected, drops=True)
    if (
        node.target is aten.mean.dim
        and dimensions(argument(node, 1, "dim"), ndim) == (dim,)
        and count
    ):
        return Averaged(dim, bool(argument(node, 2, "keepdim", False)))
    return None


def _taken(
    node: fx.Node,
    layout: Layout,
    taken: tuple[int, ...],
    protected: frozenset[int],
    *,
    drops: bool,
) -> Outcome:
    rest = set(layout.positions) - protected
    if taken and protected.issuperset(taken):
        return Taken(taken, layout.tokens.dim, None, drops)
    if rest.issubset(taken) and not drops and list(taken) == sorted(taken):
        return Taken(taken, layout.tokens.dim, replace(layout, positions=taken), drops)
    return Positional(f"{target_name(node)} takes some of the mergeable tokens by position")


def _carried(node: fx.Node, holders: list[fx.Node], flow: TokenFlow) -> Outcome:
    results = []
    for holder in holders:
        layout = flow.layouts[holder]
        tokens = move(node, holder, layout.tokens, len(layout.positions))
        if isinstance(tokens, str):
            return Positional(tokens)
        batch = move(node, holder, layout.batch, _length(holder, layout.batch))
        if isinstance(batch, str):
            return Positional(f"along the batch, {batch}")
        results.append(Layout(tokens, batch, layout.positions))
    if any(r != results[0] for r in results[1:]):
        return Positional(f"{target_name(node)} combines tokens laid out differently")
    size_at = results[0].tokens.dim if node.target in SIZED else None
    if node.target is aten.unflatten.int:
        size_at = results[0].tokens.dim - dimensions(node.args[1], len(shape_of(holders[0])))[0]
        if not 0 <= size_at < len(node.args[2]):  # type: ignore[arg-type]
            size_at = None
    return Carried(results[0], size_at, _sides(node, results[0].tokens, flow))


def _length(node: fx.Node, axis: Axis) -> Size:
    return shape_of(node)[axis.dim] // (axis.before * axis.after)


def _sides(node: fx.Node, tokens: Axis, flow: TokenFlow) -> tuple[fx.Node, ...]:
    """Operands without tokens of their own that nevertheless hold one row a token."""
    if not is_pointwise(node):
        return ()
    behind = len(shape_of(node)) - tokens.dim
    return tuple(
        a
        for a in node.all_input_nodes
        if a not in flow.layouts
        and isinstance(value := a.meta.get("val"), Tensor)
        and value.ndim >= behind
        and not same(value.shape[value.ndim - behind], 1)
    )


def _attention(node: fx.Node, flow: TokenFlow) -> Outcome:
    operands = [n for n in node.args[:3] if isinstance(n, fx.Node)]
    layouts = [flow.layouts.get(n) for n in operands]
    first = layouts[0]
    if len(layouts) < 3 or first is None or any(x != first for x in layouts):
        return Positional("this attention is not among the stream's own tokens")
    if first != Layout(Axis(2), Axis(0), first.positions) or len(shape_of(operands[0])) != 4:
        return Positional(
            "expected attention over [B, H, N, D] with all tokens on N, "
            f"got {list(shape_of(operands[0]))}"
        )
    if argument(node, 5, "is_causal", False):
        return Masked(
            "causal attention: merging would mix a token with later ones",
            "tomepass merges encoders; a decoder is left alone",
        )
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, fx.Node) and not hides_nothing(mask):
        return Masked(
            f"attention mask {mask.name} is not provably all true: it may be causal, a padding "
            "mask or a position bias",
            "call the model without a mask; a decoder is left alone",
        )
    return Attended(first)
