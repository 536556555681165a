"""DiffRate: prune the least attended tokens and merge the next, at rates found by search."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from tomepass.methods.fields import number, whole
from tomepass.methods.prune import Pruning

if TYPE_CHECKING:
    from tomepass.methods.base import Method
    from tomepass.reducing import Reducing
    from tomepass.reduction import Reduction


@dataclass(frozen=True, repr=False, kw_only=True)
class DiffRate(Pruning):
    """Differentiable compression rate (DiffRate, arXiv 2305.17997): prune and merge in a block.

    Tokens are sorted by what the class token pays them (where there is none, by what all pay). Of
    the r that go, the last are pruned; those before them each merge into the most similar of the
    tokens that stay, by the cosine of the residual stream. The paper learns the counts by
    gradient; :func:`tomepass.calibrate` searches them.

    Args:
        pruned: of the r tokens, the share that is pruned in every block (rounded down), or a
            count for each block.

    The other arguments are those of :class:`Method`; r is 16 by default.
    """

    name: ClassVar[str] = "diffrate"

    pruned: float | tuple[int, ...] = 0.5

    def check(self) -> None:
        """Normalises the share or the counts."""
        if isinstance(self.pruned, (tuple, list)):
            counts = tuple(whole("pruned", count) for count in self.pruned)
            self._set(pruned=counts)
        else:
            self._set(pruned=number("pruned", self.pruned, 0, 1))

    def pruned_in(self, index: int, r: int) -> int:
        """How many of ``r`` tokens block ``index`` prunes."""
        if isinstance(self.pruned, float):
            return int(self.pruned * r)
        return min(r, self.pruned[index]) if index < len(self.pruned) else 0

    def variants(self, linearity: tuple[float, ...]) -> tuple[Method, ...]:
        """Other shares."""
        return tuple(self.replace(pruned=share) for share in (0.0, 0.25, 0.5, 0.75))

    def reduce(self, block: Reducing) -> Reduction:
        """Prunes the tail of the order, and merges the next into the head."""
        pruned, head = self.pruned_in(block.index, block.r), block.left - len(block.protected)
        order = block.call("order_by", block.class_attention, block.protected, block.masked_size)
        last = block.tokens - len(block.protected)
        sources = block.slice(order, head, last)
        rest = (block.r, block.protected, block.masked_size, "cosine")
        matched = block.matched(
            "match_sets",
            block.side_by_side(block.hidden),
            sources,
            block.slice(order, 0, head),
            *rest,
        )
        if not pruned:
            return matched
        dropped = block.slice(order, last - pruned, last)
        holds = block.call("let_go", matched.assign, dropped)
        weight = block.call("counted", block.size, dropped, block.tokens)
        size = block.call("merge_size", weight, matched.assign, block.left)
        return replace(matched, holds=holds, weight=weight, size=size)
