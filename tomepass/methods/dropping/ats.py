"""Adaptive Token Sampling: as many tokens as the attention of an image is spread over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tomepass.methods.dropping.prune import Pruning, refuse_sizes

if TYPE_CHECKING:
    from tomepass.methods.block import ReducingBlock
    from tomepass.methods.reduction import Reduction


@dataclass(frozen=True, repr=False, kw_only=True)
class ATS(Pruning):
    """Adaptive Token Sampling, arXiv 2111.15667: tokens sampled by what they add to the class
    token, a different number for each image.

    A token scores the class token's attention times the length of its value (where there is no
    class token, the attention of all tokens). The scores summed over the sequence are a
    distribution function, and the token is kept at which it reaches each of K evenly spaced
    quantiles (section 3). One that dominates is found at several and kept once, and the places
    it leaves are out of use: no attention sees them, no mean counts them. The rest is dropped.

    K, the most that is kept of the tokens that are not protected, is what the plan leaves of
    them: it sets the shapes and with them the cost, whatever number an image keeps.

    The arguments are those of :class:`Method`; r is 16 by default.
    """

    name: ClassVar[str] = "ats"
    holes: ClassVar[bool] = True

    prop_attn: bool = False

    def check(self) -> None:
        """Refuses to count what tokens hold: each holds one."""
        refuse_sizes(self)

    def reduce(self, block: ReducingBlock) -> Reduction:
        """Samples the tokens of the ``block.left`` places."""
        score = block.call("significance", block.class_attention, block.values)
        sampled = block.call("sample", score, block.left, block.protected, block.masked_size)
        return block.pruned(block.item(sampled, 0), block.item(sampled, 1))
