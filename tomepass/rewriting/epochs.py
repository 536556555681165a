"""What is known about one stream while its graph is rewritten: all merges so far, in order.

An *epoch* is the time between two merges: epoch 0 is the sequence before any, epoch ``e`` the one
after ``e`` merges. For each epoch :class:`Merges` holds the number of tokens, and the graph nodes
of their sizes and of the maps from original tokens to merged ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from tomepass.methods.reduction import Reduction
from tomepass.planning.streams import PlannedStream
from tomepass.reading.layouts import Layout


@dataclass
class Merges:
    """The merges done so far in one stream; epoch ``e`` is the sequence after ``e`` of them.

    Args:
        planned: the stream.
        tokens: the number of tokens at each epoch.
        reductions: the index map, and how tokens combine, from each epoch to the next.
        blocks: the index of the block in which each of them takes place.
        sizes: original tokens that each token holds, at each epoch; None while nothing has merged.
        sources: at each epoch, the token that holds each original one, or stands in for it.
        holds: the same, with -1 for tokens that were dropped.
        kept: at each epoch, the original position that each token stands for.
        sides: tables and biases that were merged already, by operand and epoch.
        memory: what the method keeps from block to block.
        masked: whether some tokens are padding or out of use, and must not be attended to.
    """

    planned: PlannedStream
    tokens: list[int] = field(default_factory=list)
    masked: bool = False
    reductions: list[Reduction] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    sizes: list[fx.Node | None] = field(default_factory=lambda: [None])
    sources: list[fx.Node | None] = field(default_factory=lambda: [None])
    holds: list[fx.Node | None] = field(default_factory=lambda: [None])
    kept: list[fx.Node | None] = field(default_factory=lambda: [None])
    sides: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)
    memory: dict[str, fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens.append(self.planned.plan.tokens)

    @property
    def epoch(self) -> int:
        """The latest: how many merges there have been."""
        return len(self.reductions)

    @property
    def protected(self) -> tuple[int, ...]:
        return self.planned.plan.protected

    def held(self, epoch: int) -> tuple[int, ...]:
        """Where the protected tokens stand in the whole sequence at an epoch."""
        return self.protected if epoch == 0 else tuple(range(len(self.protected)))

    def removed(self, layout: Layout) -> list[int]:
        """The protected positions that a value does not cover."""
        return [p for p in self.protected if p not in layout.positions]

    @property
    def matches(self) -> tuple[str | None, ...]:
        """The match of each block, None where nothing merges."""
        chosen = dict(zip(self.blocks, (r.chosen for r in self.reductions), strict=True))
        found = (chosen.get(b.index) for b in self.planned.plan.blocks)
        return tuple(None if node is None else node.name for node in found)

    @property
    def counted(self) -> tuple[fx.Node | None, ...]:
        """The sizes after each block, None while nothing was reduced."""
        after = (sum(i <= b.index for i in self.blocks) for b in self.planned.plan.blocks)
        return tuple(self.sizes[epoch] if epoch else None for epoch in after)

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
