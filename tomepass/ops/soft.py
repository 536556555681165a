"""Operators of the training form: all tokens stay, and a mask says which would."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.library import at_least_float32, register, without_autocast
from tomepass.ops.positions import constant


@register(
    "gumbel_keep(Tensor score, Tensor noise, Tensor? keep, int[] protected, int? count=None) "
    "-> Tensor"
)
def gumbel_keep(
    score: Tensor,
    noise: Tensor,
    keep: Tensor | None,
    protected: list[int],
    count: int | None = None,
) -> Tensor:
    """Draws which tokens stay, with gradients (DynamicViT, arXiv 2106.02034, section 3.3).

    The Gumbel-softmax of two classes at temperature 1: the difference of two Gumbel variables is
    a logistic one. Forward the mask is hard, backward it is the soft one, straight through.

    Args:
        score: ``[B, N]`` log-odds of keeping.
        noise: a scalar, the share of the noise: 1 draws by these odds, 0 takes the likelier.
        keep: ``[B, N]``, the mask so far: a token that went stays away. None: all are there.
        protected: positions that always stay.
        count: of the others to keep: those whose odds are highest after the draw, as when tokens
            are counted in use. None: each is drawn by itself.

    Returns:
        ``[B, N]`` in the dtype of ``score``: 0 or 1.
    """
    tiny = torch.finfo(score.dtype).eps
    drawn = torch.rand_like(score).clamp(tiny, 1 - tiny)
    odds = score + noise * (drawn.log() - (-drawn).log1p())
    held = constant(sorted(protected), score.shape[0], score.device)
    if count is not None:
        odds = odds - _threshold(odds.detach(), keep, held, count)
    soft = odds.sigmoid()
    mask = (soft > 0.5).to(soft.dtype) + (soft - soft.detach())
    mask = mask.scatter(1, held, 1.0)
    return mask if keep is None else mask * keep


def _threshold(odds: Tensor, keep: Tensor | None, held: Tensor, count: int) -> Tensor:
    """What ``count`` of the odds of tokens that are there lie above: ``[B, 1]``."""
    lowest = torch.finfo(odds.dtype).min / 4
    free = odds.scatter(1, held, lowest)
    if keep is not None:
        free = torch.where(keep > 0, free, lowest)
    ordered = free.sort(-1, descending=True).values
    return (ordered[:, count - 1 : count] + ordered[:, count : count + 1]) / 2


@register(
    "masked_attention(Tensor query, Tensor key, Tensor value, Tensor keep, Tensor? bias=None, "
    "float? scale=None, bool own=True) -> Tensor"
)
def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    own: bool = True,
) -> Tensor:
    """Attention whose exponentials a mask multiplies (DynamicViT, arXiv 2106.02034, section 3.3).

    ``A_ij = exp(P_ij) G_ij / sum_k exp(P_ik) G_ik``, where ``G_ij`` is ``keep_j``, and 1 on the
    diagonal. Unlike a bias of log(keep) it has a gradient where the mask is 0.

    Args:
        query: ``[B, H, N, D]``.
        key: ``[B, H, M, D]``.
        value: ``[B, H, M, E]``.
        keep: ``[B, M]``, 0 for keys that are left out, 1 for the others.
        bias: added to the scores.
        scale: of the scores; by default D to the power -1/2.
        own: whether queries are the keys' tokens, each of which sees itself.

    Returns:
        ``[B, H, N, E]`` in the dtype of ``value``.
    """
    wide = at_least_float32(query.dtype)
    with without_autocast(query.device):
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = (query.to(wide) * factor) @ key.to(wide).transpose(-1, -2)
        if bias is not None:
            scores = scores + bias.to(wide)
        seen = keep.to(wide)[:, None, None, :]
        if own:
            seen = seen + (1 - seen) * torch.eye(keep.shape[1], dtype=wide, device=keep.device)
        # Where keys that are left out would outweigh all others their gradient is bounded.
        left = scores.detach().masked_fill(seen.detach() == 0, torch.finfo(wide).min)
        weights = (scores - left.amax(-1, keepdim=True)).clamp(max=0).exp() * seen
        total = weights.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
        return ((weights / total) @ value.to(wide)).to(value.dtype)
