"""How alike two sets of tokens are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tomepass.ops.library import at_least_float32

SIMILARITIES = ("cosine", "dot", "euclidean", "softmax")

# For orders that must tell them from no pair at all, which is -inf.
APART, UNKNOWN = -1e30, -1e31


def similarities(
    sources: Tensor,
    destinations: Tensor,
    similarity: str,
    kinds: Sequence[Tensor] | None = None,
) -> Tensor:
    """``[B, A, D]`` and ``[B, C, D]`` to ``[B, A, C]``: the larger the more alike.

    Args:
        similarity: ``"cosine"``, ``"dot"``, ``"euclidean"`` (minus the squared distance) or
            ``"softmax"`` (what attention would give each destination).
        kinds: ``[B, A]`` and ``[B, C]``, as :func:`comparable` takes them: what a softmax gives
            is shared out among destinations of the source's own kind.
    """
    if similarity == "cosine":
        sources, destinations = (
            torch.nn.functional.normalize(x, dim=-1) for x in (sources, destinations)
        )
    products: Tensor = sources @ destinations.transpose(1, 2)
    if similarity == "softmax":
        scores = products * sources.shape[-1] ** -0.5
        if kinds is not None:
            ours, theirs = kinds
            scores = torch.where(ours.unsqueeze(2) != theirs.unsqueeze(1), -float("inf"), scores)
        weights: Tensor = scores.softmax(-1)
        return weights
    if similarity == "euclidean":
        lengths = sources.square().sum(-1).unsqueeze(2), destinations.square().sum(-1).unsqueeze(1)
        return 2 * products - lengths[0] - lengths[1]
    return products


def head_mean(features: Tensor) -> Tensor:
    """What tokens are compared by: ``[B, H, N, D]`` to ``[B, N, D]``, float32 or wider."""
    return features.to(at_least_float32(features.dtype)).mean(1)


def comparable(
    scores: Tensor,
    kinds: Sequence[Tensor] | None,
    *,
    unknown: float = -float("inf"),
    apart: float = -float("inf"),
) -> Tensor:
    """Scores without what is not a number, and with tokens of different kinds kept apart.

    Args:
        scores: ``[B, A, C]``.
        kinds: ``[B, A]`` and ``[B, C]``, for example which tokens are padding; None: all are one.
        unknown: instead of what is not a number.
        apart: instead of the similarity of different kinds.
    """
    scores = torch.where(scores.isnan(), unknown, scores)
    if kinds is None:
        return scores
    ours, theirs = kinds
    return torch.where(ours.unsqueeze(2) != theirs.unsqueeze(1), apart, scores)


def padding_first(best: Tensor, padding: Sequence[Tensor] | None) -> Tensor:
    """Best edges with those of padding above all others, so that what it holds decides nothing.

    How many of the r merges are left for tokens that are seen, and in which positions these stand
    afterwards, would otherwise depend on how alike tokens are that nobody sees.

    Args:
        best: ``[B, A]``, of each source's best edge how soon it merges.
        padding: ``[B, A]`` and ``[B, C]`` bool, which sources and destinations are padding; None:
            none is. Padding without padding to merge with stays where it was ranked.
    """
    if padding is None:
        return best
    ours, theirs = padding
    return torch.where(ours & theirs.any(-1, keepdim=True), float("inf"), best)
