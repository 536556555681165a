"""Keep the important tokens and make one of all the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, get_args

from tomepass.counts.schedule import Schedule
from tomepass.methods.dropping.prune import Pruning, Score, scored
from tomepass.methods.fields import choice, flag
from tomepass.methods.reduction import Reduction

if TYPE_CHECKING:
    from torch import fx

    from tomepass.methods.block import ReducingBlock


@dataclass(frozen=True, repr=False, kw_only=True)
class EViT(Pruning):
    """Keep the tokens the class token looks at, fuse the rest (EViT, arXiv 2202.07800).

    Of N - P tokens ``ceil(keep_rate * (N - P))`` stay; the others become one token, the mean by
    what the class token pays them (the paper's sum is divided by its weights, as a model
    that was not trained with it expects tokens of full length). Where there is no class token,
    what all tokens pay is taken.

    Args:
        fuse: make a token of the rest; False drops them.

    The other arguments are those of :class:`Method`; ``keep_rate=0.7`` by default, in three
    blocks.
    """

    name: ClassVar[str] = "evit"
    standard: ClassVar[Schedule] = Schedule("keep_rate", (0.7,))

    fuse: bool = True
    prop_attn: bool = False

    def check(self) -> None:
        """Refuses two choices that make no sense together."""
        self._set(fuse=flag("fuse", self.fuse))
        if self.prop_attn and not self.fuse:
            raise ValueError("prop_attn=True does nothing with fuse=False: tokens hold one each")

    @property
    def lossy(self) -> str:
        """Fused, nothing is dropped."""
        return "" if self.fuse else super().lossy

    @property
    def fused(self) -> int:
        """One token of the rest, or none."""
        return int(self.fuse)

    def reduce(self, block: ReducingBlock) -> Reduction:
        """Keeps what the class token looks at."""
        score = block.class_attention
        if not self.fuse:
            kept = block.call("select", score, block.left, block.protected, block.masked_size)
            return block.pruned(kept)
        return packed(block, score)


@dataclass(frozen=True, repr=False, kw_only=True)
class SPViT(Pruning):
    """Keep some tokens, package the others into one (SPViT, arXiv 2112.13890).

    The paper's selector is trained. Here tokens are scored by what the model's own attention says,
    and the package token is the mean of the others by their scores.

    Args:
        score: as in :class:`tomepass.Prune`.

    The other arguments are those of :class:`Method`; ``keep_rate=0.7`` by default, in three
    blocks.
    """

    name: ClassVar[str] = "spvit"
    standard: ClassVar[Schedule] = Schedule("keep_rate", (0.7,))
    score: Score = "attention_received"
    prop_attn: bool = True

    def check(self) -> None:
        """Refuses choices there are none of."""
        choice("score", self.score, get_args(Score))

    @property
    def lossy(self) -> str:
        """Nothing is dropped: the package holds the rest."""
        return ""

    @property
    def fused(self) -> int:
        """The package."""
        return 1

    def reduce(self, block: ReducingBlock) -> Reduction:
        """Keeps what scores highest and packages the rest."""
        return packed(block, scored(block, self.score))


def packed(block: ReducingBlock, score: fx.Node) -> Reduction:
    """The highest scores, and one token of the rest, their mean by score."""
    kept = block.call("select", score, block.left - 1, block.protected, block.masked_size)
    both = block.call("fuse_rest", score, kept, block.masked_size)
    weight = block.call("weights_of", score, block.size)
    return Reduction(block.item(both, 0), kept, block.item(both, 1), weight=weight)
