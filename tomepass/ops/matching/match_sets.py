"""``tome::match_sets``: bipartite matching between sets that the data choose."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.arguments import check_heads, each_image
from tomepass.ops.library import register, without_autocast
from tomepass.ops.matching.similarity import comparable, head_mean, padding_first, similarities
from tomepass.ops.order import rank
from tomepass.ops.padding import PADDED
from tomepass.ops.positions import gather
from tomepass.ops.sequence import free_mask, in_sequence


@register(
    "match_sets(Tensor features, Tensor sources, Tensor destinations, SymInt r, int[] protected, "
    "Tensor? size, str similarity) -> (Tensor, Tensor)"
)
def match_sets(
    features: Tensor,
    sources: Tensor,
    destinations: Tensor,
    r: int,
    protected: list[int],
    size: Tensor | None,
    similarity: str,
) -> tuple[Tensor, Tensor]:
    """Each source draws an edge to its most similar destination; the ``r`` largest merge.

    As ``tome::match``, with sets chosen for each image; a token in neither stays. Ties go to the
    earlier in its set.

    Args:
        features: ``[B, H, N, D]``; compared by their mean over H.
        sources: ``[B, A]`` int64 positions.
        destinations: ``[B, C]`` int64 positions.
        r: edges that merge, A at most.
        protected: positions in neither set, first in the result.
        size: ``[B, N]``, given where some tokens are padding, which merges first, in the
            order of its set, and with padding alone as long as there is some.
        similarity: as in :func:`tomepass.ops.similarity.similarities`.

    Returns:
        ``[B, N]`` int64, each token's index among those left (protected ones, then the rest, by
        position), and ``[B, N - r]`` int64, the position of the token that stands there.

    Raises:
        ValueError: if there are fewer than r sources, or no destination.
    """
    if r > sources.shape[1] or (r and not destinations.shape[1]):
        pair = f"{sources.shape[1]} sources and {destinations.shape[1]} destinations"
        raise ValueError(f"{pair} cannot merge r={r} tokens")
    check_heads(features, "features")
    batch, _, tokens, _ = features.shape
    size = each_image(size, batch, tokens)
    with torch.no_grad(), without_autocast(features.device):
        metric = head_mean(features)
        sides = gather(metric, sources, 1), gather(metric, destinations, 1)
        kinds = None
        if size is not None:
            kinds = [(size < PADDED).gather(1, which) for which in (sources, destinations)]
        scores = comparable(similarities(*sides, similarity, kinds), kinds)
        best, partner = scores.max(dim=-1)
        merged = rank(padding_first(best, kinds)) < r
        goes = torch.where(merged, destinations.gather(1, partner), sources)
        position = torch.arange(tokens, device=features.device).expand(batch, -1)
        return in_sequence(position.scatter(1, sources, goes), tokens - r, protected)


@register("energy(Tensor features, float margin, int[] protected, Tensor? size=None) -> Tensor")
def energy(
    features: Tensor, margin: float, protected: list[int], size: Tensor | None = None
) -> Tensor:
    """How redundant tokens are (PiToMe, arXiv 2405.16148).

    The mean over the other unprotected tokens of ELU(cosine - margin): large among many alike.

    Args:
        features: ``[B, H, N, D]``; compared by their mean over H.
        margin: cosines above it count in full, those below it ever less.
        protected: positions that neither count nor matter.
        size: ``[B, N]``, given where some tokens are padding or out of use, which do not count.

    Returns:
        ``[B, N]`` float32 or wider.
    """
    check_heads(features, "features")
    size = each_image(size, *features.shape[::2])
    with torch.no_grad(), without_autocast(features.device):
        metric = head_mean(features)
        scores = torch.nn.functional.elu(similarities(metric, metric, "cosine") - margin)
        position = torch.arange(metric.shape[1], device=metric.device)
        other = (position != position[:, None]) & free_mask(
            metric.shape[1], protected, metric.device
        )
        counted = other.expand(metric.shape[0], -1, -1)
        if size is not None:
            counted = counted & (size >= PADDED).unsqueeze(1)
        total = torch.where(counted, scores, 0.0).sum(-1)
        return total / counted.sum(-1).clamp(min=1)
