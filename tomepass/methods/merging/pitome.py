"""PiToMe: merge among the redundant, protect the informative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tomepass.methods.base import Method
from tomepass.methods.fields import number

if TYPE_CHECKING:
    from tomepass.methods.block import ReducingBlock
    from tomepass.methods.reduction import Reduction


@dataclass(frozen=True, repr=False, kw_only=True)
class PiToMe(Method):
    """Protect informative tokens before merging (PiToMe, arXiv 2405.16148).

    A token's energy says how many others it resembles: the mean of ELU(cosine - margin) of the
    keys, with a margin that falls over the blocks. Tokens are split alternately by falling
    energy into sources and destinations. In the first half of the blocks all of them take part; in
    the second only the 2r of the highest energy, all of which merge: the others are protected.

    Args:
        margin: of the first block; block l of L has ``margin * (1 - l / L)``.

    The other arguments are those of :class:`Method`; r is 16 by default.
    """

    name: ClassVar[str] = "pitome"

    margin: float = 0.75

    def check(self) -> None:
        """Refuses a margin that no cosine reaches."""
        self._set(margin=number("margin", self.margin, -1, 1))

    def variants(self, linearity: tuple[float, ...]) -> tuple[Method, ...]:
        """Other margins."""
        return tuple(self.replace(margin=margin) for margin in (0.45, 0.6, 0.9))

    def reduce(self, block: ReducingBlock) -> Reduction:
        """Merges between neighbours in the order of energy."""
        margin = self.margin * (1 - block.index / block.depth)
        score = block.call("energy", block.keys, margin, block.protected, block.masked_size)
        order = block.call("order_by", score, block.protected, block.masked_size)
        taking_part = block.tokens - len(block.protected)
        if block.index >= block.depth // 2:
            taking_part = 2 * block.r
        sources = block.slice(order, 0, taking_part, 2)
        destinations = block.slice(order, 1, taking_part, 2)
        rest = (block.r, block.protected, block.masked_size, "cosine")
        return block.matched("match_sets", block.keys, sources, destinations, *rest)
