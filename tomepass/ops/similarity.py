"""How alike two sets of tokens are."""

from __future__ import annotations

import torch
from torch import Tensor

SIMILARITIES = ("cosine", "dot", "euclidean", "softmax")


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
