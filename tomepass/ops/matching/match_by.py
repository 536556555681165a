"""``tome::match_by``: bipartite matching by any measure, between any two sets of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tomepass.ops.arguments import check_heads, each_image, held_positions
from tomepass.ops.library import register, without_autocast
from tomepass.ops.matching.match import check_r, free_positions
from tomepass.ops.matching.similarity import comparable, head_mean, padding_first, similarities
from tomepass.ops.order import rank, shuffle
from tomepass.ops.padding import PADDED
from tomepass.ops.positions import constant
from tomepass.ops.sequence import partitioned

PARTITIONS = ("alternating", "sequential", "random")


@register(
    "match_by(Tensor features, SymInt r, int[] protected, Tensor? size, Tensor? importance, "
    "float exponent, str similarity, str partition, int seed) -> (Tensor, Tensor)"
)
def match_by(
    features: Tensor,
    r: int,
    protected: list[int],
    size: Tensor | None,
    importance: Tensor | None,
    exponent: float,
    similarity: str,
    partition: str,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Where each token goes, by the choices of ToMe's ablations (arXiv 2210.09461, table 1).

    As ``tome::match``, which is this with cosines of the keys' head mean and an alternating
    partition: each source draws one edge to the destination most similar to it, and the ``r``
    largest edges merge. Ties go to the lower position.

    Args:
        features: ``[B, H, N, D]``; compared by their mean over H.
        r: tokens to merge, already capped.
        protected: positions that neither merge nor are merged into.
        size: ``[B, N]``, given where there is padding, which merges first, by position, and with
            padding alone.
        importance: ``[B, N]``, not negative. An edge's dissimilarity (1 - cosine, or the squared
            distance) is multiplied with its source's importance to the power ``exponent``, and
            the r smallest merge.
        exponent: of the importance.
        similarity: as in :func:`tomepass.ops.similarity.similarities`.
        partition: one of :data:`PARTITIONS`, or ``"kth"``: sources are the even positions, the
            first half, a half drawn with ``seed``, the same everywhere, or all but every k-th.
        seed: of a random partition; k of a ``"kth"`` one.

    Returns:
        ``[B, N]`` int64, each token's index in the merged sequence (protected tokens, sources that
        stay, destinations, each by position), and ``[B, N - r]`` int64, the position of the token
        that stands there: of several the destination.

    Raises:
        ValueError: if ``r`` is more than can merge.
    """
    check_heads(features, "features")
    batch, _, tokens, _ = features.shape
    size = each_image(size, batch, tokens)
    importance = each_image(importance, batch, tokens, "importance")
    if partition != "kth":
        check_r(r, tokens, protected)
    held = constant(held_positions(tokens, protected), 1, features.device)[0]
    sources, destinations = _halves(tokens, protected, partition, seed, features.device)
    with without_autocast(features.device), torch.no_grad():
        metric = head_mean(features)
        kinds = None
        if size is not None:
            kinds = [(size < PADDED)[:, which] for which in (sources, destinations)]
        scores = similarities(metric[:, sources], metric[:, destinations], similarity, kinds)
        scores = comparable(scores, kinds)
        best, partner = scores.max(dim=-1)
        if importance is not None:
            best = _weighed(best, importance[:, sources].to(best.dtype) ** exponent, similarity)
        merged = rank(padding_first(best, kinds)) < r
    return partitioned(held, sources, destinations, partner, merged, merged, r)


def _weighed(best: Tensor, weights: Tensor, similarity: str) -> Tensor:
    """Each source's best edge, its dissimilarity multiplied with the source's weight, negated."""
    nearest = 1.0 if similarity == "cosine" else 0.0
    best = (best - nearest) * weights
    return torch.where(best.isnan(), -float("inf"), best)


def _halves(
    tokens: int, protected: Sequence[int], partition: str, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The positions of sources and of destinations, ascending."""
    even, odd, _ = free_positions(tokens, protected)
    if partition == "alternating":
        return constant(even, 1, device)[0], constant(odd, 1, device)[0]
    free = sorted(even + odd)
    half = len(free) - len(free) // 2
    if partition == "kth":
        every = free[seed - 1 :: seed]
        rest = [i for i in free if i not in every]
        return constant(rest, 1, device)[0], constant(every, 1, device)[0]
    if partition == "sequential":
        return constant(free[:half], 1, device)[0], constant(free[half:], 1, device)[0]
    # A shuffle by arithmetic: a list of drawn positions would be a constant of the graph.
    positions, (step, start, prime) = constant(free, 1, device)[0], shuffle(len(free), seed)
    order = ((torch.arange(1, len(free) + 1, device=device) * step + start) % prime).argsort()
    return positions[order[:half].sort()[0]], positions[order[half:].sort()[0]]
