"""Operators of the training form: all tokens stay, and a mask says which would."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.arguments import each_image, held_positions
from tomepass.ops.library import at_least_float32, register, without_autocast
from tomepass.ops.positions import constant

TEMPERATURE = 0.1
"""Of the Gumbel-softmax. Near 0 a mask is hard, and its gradients are few and large; near 1 many
tokens that stay a little do the work of the few that there will be."""


@register(
    "gumbel_keep(Tensor score, Tensor? keep, int[] protected, int count, bool fewer=False) "
    "-> Tensor"
)
def gumbel_keep(
    score: Tensor, keep: Tensor | None, protected: list[int], count: int, fewer: bool = False
) -> Tensor:
    """Draws which tokens stay, with gradients (DynamicViT, arXiv 2106.02034, section 3.3).

    The Gumbel-softmax of two classes (arXiv 1611.01144): the difference of two Gumbel variables is
    a logistic one. The mask is soft, not straight through: where few tokens stay, what a little
    more of one would change says little of what all of it changes.

    Args:
        score: ``[B, N]`` log-odds of keeping.
        keep: ``[B, N]``, the mask so far: a token that went stays away. None: all are there.
        protected: positions that always stay.
        count: of the others to keep: those whose odds are highest after the draw, as in use.
        fewer: of these only those whose odds are even or better, and always one, as in use.

    Returns:
        ``[B, N]`` in the dtype of ``score``, between 0 and 1; tokens to keep are above a half.
    """
    tiny = torch.finfo(score.dtype).eps
    drawn = torch.rand_like(score).clamp(tiny, 1 - tiny)
    odds = score + drawn.logit()
    places = held_positions(score.shape[1], protected)
    held = constant(places, score.shape[0], score.device)
    mask = ((odds - _threshold(odds, keep, held, count, fewer)) / TEMPERATURE).sigmoid()
    mask = mask.scatter(1, held, 1.0)
    return mask if keep is None else torch.minimum(mask, keep)


def _threshold(odds: Tensor, keep: Tensor | None, held: Tensor, count: int, fewer: bool) -> Tensor:
    """What the odds of the tokens to keep lie above: ``[B, 1]``."""
    lowest = torch.finfo(odds.dtype).min / 4
    free = odds.scatter(1, held, lowest)
    if keep is not None:
        free = torch.where(keep > 0.5, free, lowest)
    ordered = free.sort(-1, descending=True).values
    between = (ordered[:, :-1] + ordered[:, 1:]) / 2
    most = between[:, count - 1 : count]
    return torch.maximum(most, between[:, :1].clamp(max=0)) if fewer else most


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
        keep: ``[B, M]``, 0 for keys that are left out, 1 for those that are not, or between.
        bias: added to the scores.
        scale: of the scores; by default D to the power -1/2.
        own: whether queries are the keys' tokens, each of which sees itself.

    Returns:
        ``[B, H, N, E]`` in the dtype of ``value``.
    """
    keep = each_image(keep, key.shape[0], key.shape[2], "keep")
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
