"""``tome::match_kmeans``: clusters around evenly spaced tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.arguments import check_heads, each_image, held_positions
from tomepass.ops.library import register, without_autocast
from tomepass.ops.matching.similarity import APART, UNKNOWN, comparable, head_mean, similarities
from tomepass.ops.padding import PADDED
from tomepass.ops.positions import gather, sent
from tomepass.ops.sequence import free_mask, in_sequence


@register(
    "match_kmeans(Tensor features, SymInt r, int[] protected, Tensor? size, str similarity, "
    "int iterations) -> (Tensor, Tensor)"
)
def match_kmeans(
    features: Tensor,
    r: int,
    protected: list[int],
    size: Tensor | None,
    similarity: str,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Puts the tokens that are not protected into ``free - r`` clusters, one token each.

    The k-means of ToMe's ablations (arXiv 2210.09461, table 1e). Cluster i starts at the free
    token ``i * free // clusters``, which stays in it and stands for it, so that none is empty. An
    iteration sends every other token to the nearest centre, ties to the lower, and moves the
    centres to the means of their tokens.

    Args:
        features: ``[B, H, N, D]``; compared by their mean over H.
        r: tokens to lose.
        protected: positions that take no part.
        size: ``[B, N]``, given where some tokens are padding, which joins padding where a
            seed is some, and moves no other centre.
        similarity: ``"cosine"`` or ``"euclidean"``.
        iterations: of assigning; the last one is the answer.

    Returns:
        ``[B, N]`` int64, each token's index among those left (protected ones, then the seeds, by
        position), and ``[B, N - r]`` int64, the position of the token that stands there.

    Raises:
        ValueError: if not even one cluster is left.
    """
    check_heads(features, "features")
    batch, _, tokens, _ = features.shape
    size = each_image(size, batch, tokens)
    free = tokens - len(held_positions(tokens, protected))
    clusters = free - r
    if clusters < 1:
        raise ValueError(f"{free} free tokens can lose {free - 1}, got r={r}")
    with torch.no_grad(), without_autocast(features.device):
        metric = head_mean(features)
        if similarity == "cosine":
            metric = torch.nn.functional.normalize(metric, dim=-1)
        loose = free_mask(tokens, protected, features.device)
        seeds = _spaced(loose, free, clusters).expand(batch, -1)
        nearest = _nearest(metric, seeds, loose, size, similarity, iterations)
        position = torch.arange(tokens, device=features.device)
        into = torch.where(loose, seeds.gather(1, nearest), position)
        return in_sequence(into, tokens - r, protected)


def _spaced(loose: Tensor, free: int, clusters: int) -> Tensor:
    """The positions ``[clusters]`` of evenly spaced tokens among the free ones."""
    position = torch.arange(loose.shape[0], device=loose.device)
    number = loose.cumsum(0) - 1  # among the free ones
    spaced = torch.arange(clusters, device=loose.device) * free // clusters
    return torch.where(loose & (number == spaced[:, None]), position, 0).sum(-1)


def _nearest(
    metric: Tensor,
    seeds: Tensor,
    loose: Tensor,
    size: Tensor | None,
    similarity: str,
    iterations: int,
) -> Tensor:
    """The cluster ``[B, N]`` of each token, of ``metric [B, N, D]`` and ``seeds [B, clusters]``."""
    tokens, clusters = metric.shape[1], seeds.shape[1]
    seeded = sent(seeds, tokens).transpose(1, 2)  # [B, clusters, N]
    centres = gather(metric, seeds, 1)
    kinds = None
    if size is not None:
        kinds = [size < PADDED, (size < PADDED).gather(1, seeds)]
    for step in range(iterations):
        scores = similarities(metric, centres, similarity)
        scores = comparable(scores, kinds, unknown=UNKNOWN, apart=APART)
        # A seed stays where it is.
        own, member = seeded.any(1), seeded.int().argmax(1)
        nearest = torch.where(own, member, scores.argmax(-1))
        if step + 1 < iterations:
            goes = sent(nearest, clusters) & loose
            if kinds is not None:  # what a centre is the mean of is of its seed's kind
                goes = goes & (kinds[0].unsqueeze(1) == kinds[1].unsqueeze(2))
            shares = goes.to(metric.dtype)
            centres = (shares @ metric) / shares.sum(-1, keepdim=True)
    return nearest
