"""What each block of a stream merges: plain integers, worked out before a graph is touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tomepass.counts.schedule import merged_at_most


@dataclass(frozen=True)
class BlockPlan:
    """What one block does: ``tokens_out = tokens_in - r``."""

    index: int
    tokens_in: int
    r: int

    @property
    def tokens_out(self) -> int:
        """Tokens left after the block's merge."""
        return self.tokens_in - self.r


@dataclass(frozen=True)
class StreamPlan:
    """What one residual stream does.

    Args:
        tokens: tokens entering it.
        protected: positions that never merge.
        blocks: one entry a block.
    """

    tokens: int
    protected: tuple[int, ...]
    blocks: tuple[BlockPlan, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def plan_counts(
    tokens: int,
    protected: tuple[int, ...],
    counts: tuple[int, ...],
    multiple_of: int = 1,
    most: Callable[[int, tuple[int, ...]], int] = merged_at_most,
) -> StreamPlan:
    """What really goes in each block: no more than can, rounded if that is asked for.

    Rounded, no block has more tokens than it would have had.

    Args:
        most: how many of so many tokens a block can lose, given the protected positions.
    """
    blocks = []
    current = exact = tokens
    for index, asked in enumerate(counts):
        exact -= min(asked, most(exact, held_at(exact, tokens, protected)))
        goal = exact
        if exact < tokens and exact >= multiple_of:
            goal -= exact % multiple_of
        r = min(max(current - goal, 0), most(current, held_at(current, tokens, protected)))
        blocks.append(BlockPlan(index, current, r))
        current -= r
    return StreamPlan(tokens, protected, tuple(blocks))


def held_at(current: int, tokens: int, protected: tuple[int, ...]) -> tuple[int, ...]:
    """Where the protected tokens stand: first, once anything is gone."""
    return protected if current == tokens else tuple(range(len(protected)))
