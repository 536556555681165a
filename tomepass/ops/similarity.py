"""How alike two sets of tokens are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tomepass.ops.library import at_least_float32

SIMILARITIES = ("cosine", "dot", "euclidean", "softmax")
# For orders that must tell them from no pair at all, which is -inf.
APART, UNKNOWN = -1e30, -1e31


def similarities(sources: Tensor, destinations: Tensor, similarity: str) -> Tensor:
    """``[B, A, D]`` and ``[B, C, D]`` to ``[B, A, C]``: the larger the more alike.

    Args:
        similarity: ``"cosine"``, ``"dot"``, ``"euclidean"`` (minus the squared distance) or
            ``"softmax"`` (what attention would give each destination).
    """
    if similarity == "cosine":
        sources, destinations = (
            torch.nn.functional.normalize(x, dim=-1) for x in (sources, destinations)
        )
    products: Tensor = sources @ destinations.transpose(1, 2)
    if similarity == "softmax":
        weights: Tensor = (products * sources.shape[-1] ** -0.5).softmax(-1)
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
