"""``tome::attention_to``: how much attention each token gets."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.library import at_least_float32, register, without_autocast
from tomepass.ops.log_size import log_size
from tomepass.ops.positions import take


@register(
    "attention_to(Tensor query, Tensor key, Tensor? size, int[] queries, float scale) -> Tensor"
)
def attention_to(
    query: Tensor, key: Tensor, size: Tensor | None, queries: list[int], scale: float
) -> Tensor:
    """What some tokens pay each token, the mean over them and over heads.

    Args:
        query: ``[B, H, N, D]``.
        key: ``[B, H', N, D]``, H a multiple of H'.
        size: ``[B, N]`` float32 of the keys, None where attention does not count it.
        queries: positions that pay; none for all of them.
        scale: of the scores.

    Returns:
        ``[B, N]`` float32 or wider, summing to 1. No gradient flows through it.
    """
    with without_autocast(key.device), torch.no_grad():
        wide = at_least_float32(key.dtype)
        query, key = query.to(wide), key.to(wide)
        if queries:
            query = take(query.transpose(1, 2), queries).transpose(1, 2)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ key.transpose(-1, -2) * scale
        if size is not None:
            scores = scores + log_size(size, scores)
        return scores.softmax(-1).mean((1, 2))
