"""Pruning: tokens are dropped, none are merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from tomepass.counts.schedule import all_but_one
from tomepass.methods.base import Method
from tomepass.methods.fields import choice, whole

if TYPE_CHECKING:
    from torch import fx

    from tomepass.methods.block import ReducingBlock
    from tomepass.methods.reduction import Reduction


Score = Literal["class_attention", "attention_received", "norm", "random"]


@dataclass(frozen=True, repr=False)
class Pruning(Method):
    """What methods share that drop tokens: all but one of those that are not protected can go."""

    @property
    def lossy(self) -> str:
        """Whatever is dropped."""
        return "tokens that are dropped take their share of the attention with them"

    def most(self, tokens: int, protected: tuple[int, ...]) -> int:
        """All but one, and what is made of the others."""
        return max(0, all_but_one(tokens, protected) - self.fused)


@dataclass(frozen=True, repr=False, kw_only=True)
class Prune(Pruning):
    """Keep the tokens with the highest score in each block, and drop the others.

    The baselines of the literature: random pruning and pruning by attention (ToMe, arXiv
    2210.09461, table 1e; EViT, arXiv 2202.07800, without its fused token).

    Args:
        score: ``"class_attention"``, what the class token pays each token (where there is none,
            what all pay it); ``"attention_received"``, what all tokens pay it; ``"norm"``, its
            length in the residual stream; ``"random"``, the same for every image.
        seed: of a random score, which is the same everywhere for the same seed.

    The other arguments are those of :class:`Method`; r is 16 by default.
    """

    name: ClassVar[str] = "prune"

    score: Score = "class_attention"
    seed: int = 0
    prop_attn: bool = False

    def check(self) -> None:
        """Refuses choices there are none of, and two that make no sense together."""
        choice("score", self.score, get_args(Score))
        self._set(seed=whole("seed", self.seed))
        if self.seed and self.score != "random":
            raise ValueError(f"seed={self.seed} does nothing with score={self.score!r}")
        refuse_sizes(self)

    def reduce(self, block: ReducingBlock) -> Reduction:
        """Keeps the ``block.left`` tokens that score highest."""
        score = scored(block, self.score, self.seed)
        return block.pruned(
            block.call("select", score, block.left, block.protected, block.masked_size)
        )


def scored(block: ReducingBlock, score: Score, seed: int = 0) -> fx.Node:
    """The scores ``[B, N]`` of a block's tokens."""
    if score == "class_attention":
        return block.class_attention
    if score == "attention_received":
        return block.attention_to([])
    if score == "norm":
        return block.call("lengths", block.hidden)
    # Another shuffle in each block: the same one would prune by what is left of it.
    return block.call("random_score", block.hidden, block.tokens, seed + block.index)


def refuse_sizes(method: Method) -> None:
    """Raises if a method that merges nothing is to count what its tokens hold."""
    if method.prop_attn:
        raise ValueError(
            f"prop_attn=True does nothing with {type(method).__name__}: pruned tokens hold one "
            "original token each"
        )
