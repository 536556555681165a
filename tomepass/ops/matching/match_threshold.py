"""``tome::match_threshold``: bipartite matching of every pair that is similar enough."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.arguments import check_heads, each_image
from tomepass.ops.library import register, without_autocast
from tomepass.ops.matching.match import check_r, free_positions
from tomepass.ops.matching.similarity import comparable, head_mean
from tomepass.ops.order import rank
from tomepass.ops.padding import PADDED
from tomepass.ops.positions import constant, take
from tomepass.ops.sequence import partitioned


@register(
    "match_threshold(Tensor keys, SymInt r, int[] protected, Tensor? size, float tau) "
    "-> (Tensor, Tensor)"
)
def match_threshold(
    keys: Tensor, r: int, protected: list[int], size: Tensor | None, tau: float
) -> tuple[Tensor, Tensor]:
    """Where each token goes, as ``tome::match`` says, and every more similar one besides.

    Even positions draw one edge each to the odd position most similar to them. The ``r`` largest
    edges merge, and so do all others above ``tau``: what these leave is a place that nothing goes
    to. Ties go to the lower position. No gradient flows through a matching.

    Args:
        keys: ``[B, H, N, D]``, as attention sees them; the head mean is compared by cosine.
        r: tokens to lose, already capped.
        protected: positions that neither merge nor are merged into.
        size: ``[B, N]``, given where some tokens are padding or out of use: these are lost first,
            and merge with their own kind, as long as there are some left to merge with.
        tau: the similarity above which tokens merge.

    Returns:
        ``[B, N]`` int64, each token's index in the sequence of N - r: the protected tokens, the
        even ones that were not lost, the odd ones, each by position; and ``[B, N - r]`` int64, the
        position of the token that stands there: of several the odd one.

    Raises:
        ValueError: if ``r`` is more than can merge.
    """
    check_heads(keys)
    batch, _, tokens, _ = keys.shape
    size = each_image(size, batch, tokens)
    even, odd, held = free_positions(tokens, protected)
    check_r(r, tokens, held)
    with torch.no_grad(), without_autocast(keys.device):
        metric = torch.nn.functional.normalize(head_mean(keys), dim=-1)
        scores = take(metric, even) @ take(metric, odd).transpose(1, 2)
        kinds, idle = None, torch.zeros_like(scores[..., 0], dtype=torch.bool)
        if size is not None:
            # Tokens, padding and what is out of use each keep to themselves: 2, 1 and 0.
            kinds = [_kind(take(size, places)) for places in (even, odd)]
            idle = kinds[0] < 2
        similarity, partner = comparable(scores, kinds).max(dim=-1)
        lost = rank(torch.where(idle, float("inf"), similarity)) < r
        merged = lost | (~idle & (similarity > tau))
    before, sources, destinations = (constant(p, 1, keys.device)[0] for p in (held, even, odd))
    return partitioned(before, sources, destinations, partner, merged, lost, r)


def _kind(size: Tensor) -> Tensor:
    return (size > 0).long() + (size >= PADDED).long()
