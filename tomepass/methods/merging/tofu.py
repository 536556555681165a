"""Token Fusion: prune or merge, block by block, as linear as the block is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tomepass.methods.base import Method
from tomepass.methods.reduction import MLERP

if TYPE_CHECKING:
    from tomepass.methods.block import ReducingBlock
    from tomepass.methods.reduction import Reduction


Strategy = Literal["prune", "merge"]


@dataclass(frozen=True, repr=False, kw_only=True)
class ToFu(Method):
    """Token Fusion (ToFu, arXiv 2312.01026): bipartite matches, pruned or merged by block.

    Where a block is far from linear, the mean of two tokens is no token it was made for, and one
    of the two is dropped; where it is nearly linear they are merged by MLERP (section 3).

    Args:
        strategies: ``"prune"`` or ``"merge"`` for each block, as :func:`tomepass.calibrate` finds
            them by the measured linearity of the blocks; or ``"halves"``, to prune in the first
            half of the blocks and merge in the second, unmeasured.
        mlerp: how tokens are merged.

    The other arguments are those of :class:`Method`; r is 16 by default.
    """

    name: ClassVar[str] = "tofu"
    strategies: tuple[Strategy, ...] | Literal["halves"] = "halves"
    mlerp: MLERP = MLERP("max")  # noqa: RUF009 - frozen

    def check(self) -> None:
        """Refuses strategies there are none of."""
        if not isinstance(self.mlerp, MLERP):
            raise TypeError(f"mlerp must be MLERP(...), got {self.mlerp!r}")
        if self.strategies == "halves":
            return
        known = isinstance(self.strategies, (tuple, list)) and self.strategies
        if not known or not set(self.strategies) <= {"prune", "merge"}:
            raise ValueError(
                "strategies must be 'halves', or 'prune' or 'merge' for each block, got "
                f"{self.strategies!r}"
            )
        self._set(strategies=tuple(self.strategies))
        if self.mlerp != MLERP() and "merge" not in self.strategies:
            raise ValueError(f"mlerp={self.mlerp!r} does nothing with strategies={self.strategies}")

    @property
    def lossy(self) -> str:
        """Where a block prunes."""
        if self.strategies != "halves" and "prune" not in self.strategies:
            return ""
        return "in the blocks that prune, the tokens dropped are counted no more"

    def strategy(self, index: int, depth: int) -> str:
        """What block ``index`` of ``depth`` does.

        Raises:
            ValueError: if the strategies are those of another depth.
        """
        if self.strategies == "halves":
            return "prune" if index < depth // 2 else "merge"
        if len(self.strategies) != depth:
            raise ValueError(
                f"{len(self.strategies)} strategies were given and the model has {depth} blocks: "
                "give one for each"
            )
        return self.strategies[index]

    def measured(self, linearity: tuple[float, ...]) -> ToFu:
        """The half of the blocks that is least linear prunes, whichever half that is."""
        if self.strategies != "halves":
            return self
        return self._pruning(len(linearity) // 2, linearity)

    def variants(self, linearity: tuple[float, ...]) -> tuple[Method, ...]:
        """Pruning in the quarter, half or three quarters of the blocks that are least linear."""
        depth = len(linearity)
        shares = (0, depth // 4, depth // 2, 3 * depth // 4)
        return tuple(self._pruning(blocks, linearity) for blocks in shares)

    def _pruning(self, blocks: int, linearity: tuple[float, ...]) -> ToFu:
        """Pruning in so many of the blocks, the least linear ones."""
        pruned = sorted(range(len(linearity)), key=lambda i: -linearity[i])[:blocks]
        strategies = ("prune" if i in pruned else "merge" for i in range(len(linearity)))
        return self.replace(strategies=tuple(strategies))

    def __repr__(self) -> str:
        # The default is a fallback, not a measurement: it is not left unsaid.
        said = super().__repr__()
        return f"{said[:-1]}, strategies='halves')" if self.strategies == "halves" else said

    def reduce(self, block: ReducingBlock) -> Reduction:
        """Matches as ToMe does, then drops the sources or merges them."""
        args = (block.masked_size, None, 1.0, "cosine", "alternating", 0)
        matched = block.matched(
            "match_by", block.keys, block.r, block.protected, *args, combine=self.mlerp
        )
        if self.strategy(block.index, block.depth) == "merge":
            return matched
        return block.without_sources(matched)

    @classmethod
    def fields_from(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Fields as :meth:`to_dict` wrote them, back in their own types."""
        fields = super().fields_from(data)
        if "mlerp" in fields:
            fields["mlerp"] = MLERP(fields["mlerp"]["mlerp"])
        return fields
