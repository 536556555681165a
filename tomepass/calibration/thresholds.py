"""The threshold of similarity that keeps a wanted number of tokens on average."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree

from tomepass.methods.base import Method
from tomepass.methods.fields import number
from tomepass.methods.merging.threshold import STEPS, Threshold
from tomepass.reporting.kept import Counting

if TYPE_CHECKING:
    from torch import nn


class KeptOfBatches:
    """Some batches of inputs, captured once: what methods keep of their tokens.

    Raises:
        ValueError: if there are none.
        TomeError: if the model cannot be rewritten with the method.
    """

    def __init__(self, model: nn.Module, method: Method, batches: Iterable[Any]) -> None:
        from tomepass.handover.applying import apply

        self.batches = list(batches)
        if not self.batches:
            raise ValueError("batches: expected one or more, got none")
        self.merged = apply(model, method, example_inputs=self.batches[0])

    @torch.no_grad()
    def share(self, method: Method) -> float:
        """The share of the tokens that is in use after the last block, the mean over images."""
        from tomepass.capture.captured import read_state
        from tomepass.handover.added import captured

        made: dict[int, Counting] = {}
        kept, tokens = [], 1
        for inputs in self.batches:
            capture = captured(self.merged, inputs).capture
            if (counting := made.get(id(capture))) is None:
                counting = made[id(capture)] = Counting.of(capture, method)
            leaves = pytree.tree_leaves(self.merged._tome.call_of(inputs))
            kept.append(
                counting.counts(read_state(self.merged._tome.model, capture), leaves)[:, -1]
            )
            tokens = counting.tokens
        return float(torch.cat(kept).double().mean()) / tokens


def calibrate_tau(
    model: nn.Module, batches: Iterable[Any], rate: float, method: Threshold | None = None
) -> float:
    """The threshold at which images keep a share of their tokens on average.

    Found by bisection between -1 and 1, which the same batches always lead to the same value::

        method = Threshold(r=4)
        method = method.replace(tau=calibrate_tau(model, batches, 0.5, method))

    Args:
        model: the model, in eval mode.
        batches: inputs, each as ``example_inputs`` of :func:`tomepass.apply`.
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
    for _ in range(STEPS):
        middle = (low + high) / 2
        if kept.share(method.replace(tau=middle)) < rate:
            low = middle
        else:
            high = middle
    return high
