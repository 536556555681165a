"""``tome::significance`` and ``tome::sample``: a different number of tokens for each image."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.arguments import each_image, held_positions
from tomepass.ops.library import at_least_float32, register, without_autocast
from tomepass.ops.padding import PADDED
from tomepass.ops.positions import constant
from tomepass.ops.sequence import free_mask


@register("significance(Tensor attention, Tensor values) -> Tensor")
def significance(attention: Tensor, values: Tensor) -> Tensor:
    """What each token adds to a token that attends to it: its attention times the length of its
    value (the score of ATS, arXiv 2111.15667, section 3, before it is normalised).

    Args:
        attention: ``[B, N]``, the mean over heads.
        values: ``[B, H, N, D]``; their length is that of all heads side by side.

    Returns:
        ``[B, N]``, float32 or wider. No gradient flows through it.
    """
    with torch.no_grad(), without_autocast(values.device):
        wide = values.to(at_least_float32(values.dtype))
        return attention.to(wide.dtype) * wide.square().sum((1, 3)).sqrt()


@register(
    "sample(Tensor score, SymInt tokens, int[] protected, Tensor? size=None) -> (Tensor, Tensor)"
)
def sample(
    score: Tensor, tokens: int, protected: list[int], size: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens at evenly spaced quantiles of their scores (ATS, arXiv 2111.15667, section 3).

    The scores of the tokens that are not protected, summed along the sequence and normalised, are a
    distribution function; the k-th of K samples is the first token at which it reaches
    (2k - 1) / 2K. A token sampled several times is kept once: the other places are out of use.

    Args:
        score: ``[B, N]``, not negative; what is not a number counts as 0. Where no token scores
            anything all count alike.
        tokens: N' places, those of the protected tokens among them.
        protected: positions that are kept whatever their score.
        size: ``[B, N]``, given where some tokens are padding or out of use: these are not sampled.

    Returns:
        ``[B, N']`` int64, the position of the token at each place: the protected ones, then the
        sampled ones, each ascending; and ``[B, N']`` float32, 1 for a place in use, else 0.

    Raises:
        ValueError: if no token but the protected ones is to be kept, or more than all are.
    """
    places = held_positions(score.shape[1], protected)
    if not len(places) < tokens <= score.shape[1]:
        raise ValueError(f"{tokens} of {score.shape[1]} tokens, {len(places)} of them protected")
    size = each_image(size, *score.shape)
    with torch.no_grad(), without_autocast(score.device):
        batch, total = score.shape
        held = constant(places, batch, score.device)
        usable = free_mask(total, protected, score.device).expand_as(score)
        if size is not None:
            usable = usable & (size >= PADDED)
        reached = _distribution(torch.where(usable, score, 0.0), usable)
        count = tokens - len(places)
        goal = (2 * torch.arange(count, device=score.device) + 1) / (2 * count)
        # The first position that reaches a goal has as many before it as do not.
        found = (reached.unsqueeze(1) < goal.to(reached.dtype).unsqueeze(-1)).sum(-1)
        found = found.clamp(max=total - 1)
        # Samples ascend: one that is there again follows itself. (Bools are not padded: Inductor's
        # C++ of torch 2.13 does not compile then.)
        before = torch.nn.functional.pad(found[:, :-1], (1, 0), value=-1)
        used = torch.cat([torch.ones_like(held).float(), (found != before).float()], dim=1)
        return torch.cat([held, found], dim=1), used


def _distribution(score: Tensor, usable: Tensor) -> Tensor:
    """The share of all scores up to each position, which ends at exactly 1."""
    score = torch.where(score > 0, score, 0.0)  # what is not a number is not above 0
    nothing = score.amax(-1, keepdim=True) == 0
    summed = torch.where(nothing, usable.to(score.dtype), score).cumsum(-1)
    return summed / summed[:, -1:]
