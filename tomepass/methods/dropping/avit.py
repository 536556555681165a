"""A-ViT: tokens halt when the scores they gathered block by block reach a limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tomepass.methods.dropping.prune import Pruning, refuse_sizes
from tomepass.methods.fields import number

if TYPE_CHECKING:
    from tomepass.methods.block import ReducingBlock
    from tomepass.methods.reduction import Reduction


_TOTAL = "avit_total"


@dataclass(frozen=True, repr=False, kw_only=True)
class AViT(Pruning):
    """A-ViT, arXiv 2112.07658: every token halts as soon as its halting scores add up to one.

    In each block a token scores h = sigmoid(gamma x + beta), x its first channel in the residual
    stream and halts when the sum over the blocks so far has reached 1 - epsilon (section 3).
    A halted token is out of use from then on: no attention sees it, no mean counts it. Protected
    tokens never halt, and of the others one is always left.

    Shapes are static: the plan says how many tokens each block drops, halted ones first and then
    those with the highest sums. Where it drops none at all nothing is done; elsewhere scores add
    up in every block. The scores are read where tokens are dropped, after a block's attention.
    Models are trained to halt, with a first channel that means it. The paper's head reads a mean
    of the class token over blocks, weighted by its scores: here it reads that of the last block.

    Args:
        gamma: the scale of the score.
        beta: its shift, so low that no token halts at once.
        epsilon: what may be missing of one.

    The other arguments are those of :class:`Method`; r is 16 by default.
    """

    name: ClassVar[str] = "avit"
    holes: ClassVar[bool] = True
    every_block: ClassVar[bool] = True

    gamma: float = 5.0
    beta: float = -10.0
    epsilon: float = 0.01
    prop_attn: bool = False

    def check(self) -> None:
        """Refuses what are no numbers, and to count what tokens hold: each holds one."""
        most = math.nextafter(math.inf, 0)
        self._set(
            gamma=number("gamma", self.gamma, -most, most),
            beta=number("beta", self.beta, -most, most),
            epsilon=number("epsilon", self.epsilon, 0, 1),
        )
        refuse_sizes(self)

    def reduce(self, block: ReducingBlock) -> Reduction:
        """Adds up the scores, halts tokens, and keeps the ``block.left`` lowest sums."""
        before = block.memory.get(_TOTAL)
        gate = (self.gamma, self.beta)
        total = block.call("halting", block.hidden, before, block.masked_size, *gate)
        halted = block.call("halt", total, block.size, block.protected, 1 - self.epsilon)
        size, score = block.item(halted, 0), block.item(halted, 1)
        stands = block.call("select", score, block.left, block.protected, size)
        # Sums follow their tokens to the next block.
        block.memory[_TOTAL] = block.call("gather_size", total, stands)
        return block.pruned(stands, block.call("gather_size", size, stands))
