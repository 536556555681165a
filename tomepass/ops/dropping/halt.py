"""``tome::halting`` and ``tome::halt``: tokens that have been computed for long enough."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.arguments import each_image
from tomepass.ops.library import at_least_float32, register, without_autocast
from tomepass.ops.padding import PADDED
from tomepass.ops.sequence import free_mask


@register("halting(Tensor hidden, Tensor? before, Tensor? size, float gamma, float beta) -> Tensor")
def halting(
    hidden: Tensor, before: Tensor | None, size: Tensor | None, gamma: float, beta: float
) -> Tensor:
    """Halting scores summed over blocks: h = sigmoid(gamma x + beta) of each token's first
    channel x in each (A-ViT, arXiv 2112.07658, section 3).

    Args:
        hidden: ``[B, N, C]``, the residual stream of a block.
        before: ``[B, N]``, the sums of the blocks before, None in the first.
        size: ``[B, N]``, None while all hold one token; what is out of use gains nothing more.
        gamma: the scale.
        beta: the shift.

    Returns:
        ``[B, N]``, float32 or wider. No gradient flows through it.
    """
    size = each_image(size, *hidden.shape[:2])
    with torch.no_grad(), without_autocast(hidden.device):
        first = hidden[..., 0].to(at_least_float32(hidden.dtype))
        score = torch.sigmoid(gamma * first + beta)
        if size is not None:
            score = torch.where(size < PADDED, 0.0, score)
        return score if before is None else before + score


@register("halt(Tensor total, Tensor? size, int[] protected, float limit) -> (Tensor, Tensor)")
def halt(
    total: Tensor, size: Tensor | None, protected: list[int], limit: float
) -> tuple[Tensor, Tensor]:
    """Sizes after tokens halted: 0 where the sum of scores has reached the limit.

    Args:
        total: ``[B, N]``, the sums of the halting scores.
        size: ``[B, N]`` before, None while all hold one token.
        protected: positions that never halt. Of the others in use the one with the lowest sum,
            of several the first, does not either: something is left to read.
        limit: of the sum.

    Returns:
        ``[B, N]`` float32; and ``[B, N]``, the higher the farther a token is from halting.
    """
    size = each_image(size, *total.shape)
    with torch.no_grad(), without_autocast(total.device):
        size = torch.ones_like(total, dtype=torch.float32) if size is None else size
        free = free_mask(total.shape[1], protected, total.device).expand_as(total)
        last = torch.where(free & (size >= PADDED), total, float("inf")).argmin(-1, keepdim=True)
        stays = ~free.scatter(1, last, False)
        return torch.where(stays | (total < limit), size, 0.0), -total
