"""Operators of learned policies: how much each token deserves to stay, and who is in use."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tomepass.ops.arguments import each_image, held_positions
from tomepass.ops.dropping.prune import gather_size
from tomepass.ops.library import at_least_float32, register, without_autocast
from tomepass.ops.order import shuffle
from tomepass.ops.padding import PADDED
from tomepass.ops.positions import constant


@register("keep_score(Tensor x, Tensor? size, Tensor[] weights, int[] protected) -> Tensor")
def keep_score(
    x: Tensor, size: Tensor | None, weights: list[Tensor], protected: list[int]
) -> Tensor:
    """The prediction module of DynamicViT (arXiv 2106.02034, section 3.2).

    Args:
        x: ``[B, N, C]`` tokens.
        size: ``[B, N]``, what each counts in the mean over tokens; None for one each. It may
            need gradients.
        weights: scale and shift of the norm, then matrix and bias of four linear layers: C to
            2C', 2C' to C', C' to C'/2 and C'/2 to 2, where C' is C/2. The first two columns of
            features are the local ones and those that are averaged.
        protected: positions that the mean leaves out.

    Returns:
        ``[B, N]``: the log-odds of keeping each token, the difference of its two logits. The
        hidden layers are computed in the dtype of ``x``, the rest in float32 or wider.
    """
    wide = at_least_float32(x.dtype)
    with without_autocast(x.device):
        scale, shift, *layers = [weight.to(x.dtype) for weight in weights[:8]]
        normed = F.layer_norm(x, x.shape[-1:], scale, shift)
        local, shared = F.gelu(F.linear(normed, *layers[:2])).chunk(2, -1)
        mean = _mean(shared, size, protected).to(x.dtype)
        hidden = torch.cat([local, mean.unsqueeze(1).expand_as(local)], -1)
        hidden = F.gelu(F.linear(hidden, *layers[2:4]))
        hidden = F.gelu(F.linear(hidden, *layers[4:6]))
        matrix, bias = (weight.to(wide) for weight in weights[8:])
        keep, drop = F.linear(hidden.to(wide), matrix, bias).unbind(-1)
        return keep - drop


@register("keep_score_linear(Tensor x, Tensor? size, Tensor[] weights, int[] protected) -> Tensor")
def keep_score_linear(
    x: Tensor, size: Tensor | None, weights: list[Tensor], protected: list[int]
) -> Tensor:
    """A linear policy on each token and the class token (AdaViT, arXiv 2111.15668).

    Args:
        x: ``[B, N, C]`` tokens.
        size: ``[B, N]``, what each counts in the mean over tokens; None for one each.
        weights: scale and shift of the norm ``[C]``, what each feature of a token and of the
            class token counts ``[1, C]``, and the bias ``[1]``.
        protected: the class token's position first; where there is none, the mean over tokens
            takes its place.

    Returns:
        ``[B, N]``: the log-odds of keeping each token, in float32 or wider.
    """
    wide = at_least_float32(x.dtype)
    with without_autocast(x.device):
        scale, shift, own, other, bias = (weight.to(wide) for weight in weights)
        normed = F.layer_norm(x.to(wide), x.shape[-1:], scale, shift)
        whole = normed[:, protected[0]] if protected else _mean(normed, size, protected)
        return F.linear(normed, own).squeeze(-1) + F.linear(whole, other, bias)


@register("drawn(Tensor odds, SymInt tokens, int seed) -> Tensor")
def drawn(odds: Tensor, tokens: int, seed: int) -> Tensor:
    """Log-odds after a draw: each and a logistic variable, the same for every image.

    A sum is above 0 with its token's probability, and the highest are a draw of the
    Gumbel-softmax. Tokens that look alike have like odds: the highest of these alone would be
    near duplicates. The i-th token's variable is the quantile of ``((i * step + start) % prime +
    1/2) / prime``, the prime the first above N, step next to the golden section of it, which
    spreads them evenly, start as :func:`~tomepass.ops.prune.shuffle` draws it.

    Args:
        odds: ``[B, N]`` log-odds.
        tokens: N.
        seed: of the draw.

    Returns:
        ``[B, N]`` in the dtype of ``odds``.
    """
    _, start, prime = shuffle(tokens, seed)
    step = round(prime * (5**0.5 - 1) / 2)
    order = (torch.arange(1, tokens + 1, device=odds.device) * step + start) % prime
    return odds + ((order.to(odds.dtype) + 0.5) / prime).logit()


@register("used_size(Tensor score, Tensor? size, Tensor stands, int[] protected) -> Tensor")
def used_size(score: Tensor, size: Tensor | None, stands: Tensor, protected: list[int]) -> Tensor:
    """Sizes of the tokens kept, 0 for those that their score puts out of use.

    Args:
        score: ``[B, N]`` log-odds of keeping, drawn; below 0 a token is out of use.
        size: ``[B, N]`` before, None for one each; what is out of use stays so.
        stands: ``[B, N']`` positions of the tokens kept, the protected ones first.
        protected: positions that are always in use, as is the highest score among the others.

    Returns:
        ``[B, N']`` float32.
    """
    size = each_image(size, *score.shape)
    with torch.no_grad():
        kept = gather_size(size, stands)
        lowest = torch.finfo(score.dtype).min  # what is not a number still is some token's
        score = torch.where(score.isnan(), lowest, score).clamp(min=lowest).gather(1, stands)
        place = torch.arange(stands.shape[1], device=stands.device)
        held = place < len(protected)
        free = torch.where(held | (kept < PADDED), -float("inf"), score)
        highest = place == free.argmax(-1, keepdim=True)
        return torch.where(held | (score >= 0) | highest, kept, 0.0)


def _mean(x: Tensor, size: Tensor | None, protected: list[int]) -> Tensor:
    """The mean over tokens that are not protected, by what each counts: ``[B, C]``, wide."""
    wide = at_least_float32(x.dtype)
    size = each_image(size, *x.shape[:2])
    count = x.new_ones(x.shape[:2], dtype=wide) if size is None else size.to(wide)
    held = held_positions(x.shape[1], protected)
    count = count.scatter(1, constant(held, x.shape[0], x.device), 0.0)
    total = count.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    mean: Tensor = torch.matmul((count / total).unsqueeze(1), x.to(wide))
    return mean.squeeze(1)
