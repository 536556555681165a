"""Merging by a threshold: every pair of tokens that is similar enough, however many there are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tomepass.methods.base import Method
from tomepass.methods.fields import number

if TYPE_CHECKING:
    from torch import nn

    from tomepass.methods.block import ReducingBlock
    from tomepass.methods.reduction import Reduction

# Cosines lie within 2 of each other: to 2^-15, less than images differ by.
_STEPS = 16


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


def calibrate_tau(
    model: nn.Module, batches: Iterable[Any], rate: float, method: Threshold | None = None
) -> float:
    """The threshold at which images keep a share of their tokens on average.

    Found by bisection between -1 and 1, which the same batches always lead to the same value::

        method = Threshold(r=4)
        method = method.replace(tau=calibrate_tau(model, batches, 0.5, method))

    Args:
        model: the model, in eval mode.
        batches: inputs, each as :meth:`tomepass.MergedModel.prepare` takes them.
        rate: the share of the tokens that enter the first stream, protected ones too, which is to
            be in use after its last block, the mean over all images.
        method: whose plan is followed; its own ``tau`` does not count.

    Returns:
        the lowest ``tau`` found at which no less than the share is kept.

    Raises:
        TypeError: if ``method`` is no :class:`Threshold`.
        ValueError: if there are no batches, or no ``tau`` keeps that share: the plan's own merges
            leave less, or all similar tokens merged leave more.
        TomeError: if the model cannot be merged.
    """
    from tomepass.kept import KeptOfBatches

    method = Threshold() if method is None else method
    if not isinstance(method, Threshold):
        raise TypeError(f"method must be a Threshold, got {method!r}")
    rate = number("rate", rate, 0, 1, above=True)
    kept = KeptOfBatches(model, method, batches)
    low, high = -1.0, 1.0
    least, most = (kept.share(method.replace(tau=tau)) for tau in (low, high))
    if not least <= rate <= most:
        raise ValueError(
            f"rate={rate}: {method!r} keeps from {least:.3f} to {most:.3f} of these images' tokens"
        )
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if kept.share(method.replace(tau=middle)) < rate:
            low = middle
        else:
            high = middle
    return high
