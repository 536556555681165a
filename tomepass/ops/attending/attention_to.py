"""``tome::attention_to`` and ``tome::received``: how much attention each token gets."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.arguments import check_heads, each_image
from tomepass.ops.attending.log_size import log_size
from tomepass.ops.library import at_least_float32, register, without_autocast
from tomepass.ops.padding import PADDED
from tomepass.ops.positions import take


@register(
    "attention_to(Tensor query, Tensor key, Tensor? size, int[] queries, float scale, "
    "Tensor? bias=None) -> Tensor"
)
def attention_to(
    query: Tensor,
    key: Tensor,
    size: Tensor | None,
    queries: list[int],
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """What some tokens pay each token, the mean over them and over heads.

    Args:
        query: ``[B, H, N, D]``.
        key: ``[B, H', N, D]``, H a multiple of H'.
        size: ``[B, N]`` float32 of the keys, None where attention does not count it.
        queries: positions that pay; none for all of them, but for padding and what is out of use.
        scale: of the scores.
        bias: ``[..., N, N]``, at most four dimensions, added to the scores: a position bias.

    Returns:
        ``[B, N]`` float32 or wider, summing to 1. No gradient flows through it.
    """
    check_heads(key)
    size = each_image(size, *key.shape[::2])
    with without_autocast(key.device), torch.no_grad():
        wide = at_least_float32(key.dtype)
        query, key = query.to(wide), key.to(wide)
        if queries:
            query = take(query.transpose(1, 2), queries).transpose(1, 2)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ key.transpose(-1, -2) * scale
        if bias is not None:
            bias = bias.reshape([1] * (4 - bias.ndim) + list(bias.shape))
            if queries and bias.shape[-2] > 1:
                bias = take(bias.transpose(1, 2), queries).transpose(1, 2)
            scores = scores + bias.to(wide)
        if size is not None:
            scores = scores + log_size(size, scores)
        paid = scores.softmax(-1)
        if queries or size is None:
            return paid.mean((1, 2))
        found: Tensor = received(paid.mean(1), size)
        return found


@register("received(Tensor paid, Tensor size) -> Tensor")
def received(paid: Tensor, size: Tensor) -> Tensor:
    """The mean of what tokens pay each token, ``[B, N, N]`` to ``[B, N]``, over those in use.

    Args:
        paid: the attention weights, float32 or wider.
        size: ``[B, N]`` of the tokens that pay: padding and what is out of use has next to none.
    """
    pays = (each_image(size, *paid.shape[:2]) >= PADDED).to(paid.dtype)
    return (pays.unsqueeze(1) @ paid).squeeze(1) / pays.sum(-1, keepdim=True)
