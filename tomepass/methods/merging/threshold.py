"""Merging by a threshold: every pair of tokens that is similar enough, however many there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tomepass.methods.base import Method
from tomepass.methods.fields import number

if TYPE_CHECKING:
    from tomepass.methods.block import ReducingBlock
    from tomepass.methods.reduction import Reduction


# Cosines lie within 2 of each other: to 2^-15, less than images differ by.
STEPS = 16


@dataclass(frozen=True, repr=False, kw_only=True)
class Threshold(Method):
    """Token Merging (arXiv 2210.09461) of all edges above a similarity, a different number for
    each image.

    Edges are drawn as :class:`ToMe` draws them: each token on an even position draws one to the
    odd one whose keys are most alike. The ``r`` most similar merge whatever their similarity, so
    that shapes are static; those beyond them merge if they are above ``tau``, and the places they
    leave are out of use: no attention sees them, no mean counts them, and of the even positions
    the next block that reduces loses them first. Where the plan says 0 nothing merges.

    Args:
        tau: the cosine above which tokens merge, from -1, all of them, to 1, the ``r`` alone.
            What a value keeps depends on the model: :func:`calibrate_tau` finds one.

    The other arguments are those of :class:`Method`; r is 16 by default.
    """

    name: ClassVar[str] = "threshold"
    holes: ClassVar[bool] = True

    tau: float = 0.9

    def check(self) -> None:
        """Refuses what is no cosine."""
        self._set(tau=number("tau", self.tau, -1, 1))

    def reduce(self, block: ReducingBlock) -> Reduction:
        """Merges the most similar ``block.r`` pairs and all others above the threshold."""
        given = (block.keys, block.r, block.protected, block.masked_size, self.tau)
        return block.matched("match_threshold", *given)
