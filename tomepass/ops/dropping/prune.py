"""Operators of pruning: which tokens stay, and what stands in for those that go."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.arguments import check_heads, each_image, held_positions
from tomepass.ops.library import at_least_float32, register, without_autocast
from tomepass.ops.matching.similarity import head_mean
from tomepass.ops.order import rank, shuffle
from tomepass.ops.padding import PADDED
from tomepass.ops.positions import constant, gather, sent
from tomepass.ops.sequence import free_mask


@register("select(Tensor score, SymInt tokens, int[] protected, Tensor? size=None) -> Tensor")
def select(score: Tensor, tokens: int, protected: list[int], size: Tensor | None = None) -> Tensor:
    """The tokens with the highest scores.

    Args:
        score: ``[B, N]``. What is not a number is the lowest; ties go to the lower position.
        tokens: N' to keep, protected ones among them.
        protected: positions that are kept whatever their score.
        size: ``[B, N]``, given where some tokens are padding or out of use: these go first.

    Returns:
        ``[B, N']`` int64 positions: the protected ones, then the others, each ascending.

    Raises:
        ValueError: if fewer than the protected ones or more than all are to be kept.
    """
    held = held_positions(score.shape[1], protected)
    if not len(held) <= tokens <= score.shape[1]:
        raise ValueError(f"{tokens} of {score.shape[1]} tokens, {len(held)} of them protected")
    with torch.no_grad():
        place = falling(score, protected, size)
        kept = (place >= 0) & (place < tokens - len(held))
        position = torch.arange(score.shape[1], device=score.device)
        places = torch.where(kept, kept.cumsum(-1) - 1, -1)
        chosen = torch.where(sent(places, tokens - len(held)), position, 0).sum(-1)
        return torch.cat([constant(held, score.shape[0], score.device), chosen], dim=1)


@register("order_by(Tensor score, int[] protected, Tensor? size=None) -> Tensor")
def order_by(score: Tensor, protected: list[int], size: Tensor | None = None) -> Tensor:
    """The positions that are not protected, by falling score; ties by position.

    Args:
        score: ``[B, N]``. What is not a number is the lowest.
        protected: positions left out.
        size: ``[B, N]``, given where some tokens are padding or out of use: these come last.

    Returns:
        ``[B, N - P]`` int64.
    """
    tokens = score.shape[1]
    with torch.no_grad():
        place = falling(score, protected, size)
        position = torch.arange(tokens, device=score.device)
        left = tokens - len(set(protected))
        return torch.where(sent(place, left), position, 0).sum(-1)


def falling(score: Tensor, protected: list[int], size: Tensor | None) -> Tensor:
    """Each token's place by falling score, ``[B, N]`` int64; -1 for a protected one."""
    free = free_mask(score.shape[1], protected, score.device)
    size = each_image(size, *score.shape)
    wide = _told_apart(score, size)
    return torch.where(free, rank(wide, free.expand_as(wide)), -1)


def _told_apart(score: Tensor, size: Tensor | None) -> Tensor:
    """Scores, those that are no numbers below all others, and those of padding below these."""
    if size is None:
        return torch.where(score.isnan(), -float("inf"), score)
    number = torch.where(score.isnan(), torch.finfo(score.dtype).min, score)
    number = number.clamp(min=torch.finfo(score.dtype).min)
    return torch.where(size < PADDED, -float("inf"), number)


@register("places(Tensor stands, SymInt tokens, Tensor? size=None) -> Tensor")
def places(stands: Tensor, tokens: int, size: Tensor | None = None) -> Tensor:
    """Where each of N tokens stands among those kept, -1 where it was dropped.

    Args:
        stands: ``[B, N']`` positions of the tokens kept.
        tokens: N.
        size: ``[B, N']`` of the tokens kept, given where some places are out of use: of size 0,
            they hold none.

    Returns:
        ``[B, N]`` int64.
    """
    here = sent(stands, tokens).transpose(1, 2)
    size = each_image(size, *stands.shape)
    if size is not None:
        here = here & (size != 0).unsqueeze(-1)
    place = torch.arange(stands.shape[1], device=stands.device)[:, None]
    return torch.where(here, place, -1).amax(1)


@register("nearest(Tensor features, Tensor stands, int[] protected, Tensor? size=None) -> Tensor")
def nearest(
    features: Tensor, stands: Tensor, protected: list[int], size: Tensor | None = None
) -> Tensor:
    """Where each token is found among those kept: a dropped one at the most similar of them.

    Args:
        features: ``[B, H, N, D]``, compared by the cosine of their mean over H.
        stands: ``[B, N']`` positions of the tokens kept, the protected ones first.
        protected: positions that stand in for none but themselves, unless nothing else is kept.
        size: ``[B, N']`` of the tokens kept, given where some are padding or out of use: these
            stand in for none, and what is out of use is found at another one itself.

    Returns:
        ``[B, N]`` int64 indices into the tokens kept.
    """
    check_heads(features, "features")
    size = each_image(size, *stands.shape)
    with torch.no_grad(), without_autocast(features.device):
        metric = torch.nn.functional.normalize(head_mean(features), dim=-1)
        scores = metric @ gather(metric, stands, 1).transpose(1, 2)
        scores = torch.where(scores.isnan(), -2.0, scores)
        if size is not None:
            scores = torch.where((size < PADDED).unsqueeze(1), -3.0, scores)
        held = torch.arange(stands.shape[1], device=stands.device) < len(protected)
        scores = torch.where(held, -4.0, scores)
        own = places(stands, features.shape[2], size)
        return torch.where(own < 0, scores.argmax(-1), own)


@register("fuse_rest(Tensor score, Tensor stands, Tensor? size=None) -> (Tensor, Tensor)")
def fuse_rest(score: Tensor, stands: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All tokens that are not kept, as one more at the end.

    Args:
        score: ``[B, N]``: of those fused the token with the highest stands for it.
        stands: ``[B, N' - 1]`` positions of the tokens kept.
        size: ``[B, N]``, given where some tokens are padding, which stands for others last.

    Returns:
        ``[B, N]`` int64, each token's index, and ``[B, N']`` int64, the position at each index.
    """
    with torch.no_grad():
        own = places(stands, score.shape[1])
        wide = _told_apart(score, each_image(size, *score.shape))
        order = rank(wide, own < 0)  # among those fused
        position = torch.arange(score.shape[1], device=score.device)
        fused = torch.where((own < 0) & (order == 0), position, 0).sum(-1, keepdim=True)
        return torch.where(own < 0, stands.shape[1], own), torch.cat([stands, fused], dim=1)


@register("gather_size(Tensor? size, Tensor stands) -> Tensor")
def gather_size(size: Tensor | None, stands: Tensor) -> Tensor:
    """Sizes of the tokens kept: ``[B, N]`` or None and ``[B, N']`` to ``[B, N']`` float32."""
    if size is None:
        return torch.ones_like(stands, dtype=torch.float32)
    size = each_image(size, stands.shape[0], size.shape[-1])
    return gather(size.to(torch.float32), stands, 1)


@register("random_score(Tensor like, SymInt tokens, int seed) -> Tensor")
def random_score(like: Tensor, tokens: int, seed: int) -> Tensor:
    """A shuffle of N scores, the same for every image, and everywhere for the same seed.

    The i-th token, counted from 1, scores ``(i * step + start) % prime``: the prime the first
    above N, step and start the first draws of ``random.Random(seed)`` below it, step not 0.

    Returns:
        ``[B, N]`` float32 on the device of ``like``.
    """
    step, start, prime = shuffle(tokens, seed)
    order = (torch.arange(1, tokens + 1, device=like.device) * step + start) % prime
    return order.float().expand(like.shape[0], -1)


@register("lengths(Tensor x) -> Tensor")
def lengths(x: Tensor) -> Tensor:
    """Lengths of tokens: ``[B, N, C]`` to ``[B, N]``, float32 or wider."""
    with torch.no_grad(), without_autocast(x.device):
        found: Tensor = torch.linalg.vector_norm(x.to(at_least_float32(x.dtype)), dim=-1)
        return found


@register("weights_of(Tensor score, Tensor? size) -> Tensor")
def weights_of(score: Tensor, size: Tensor | None) -> Tensor:
    """Scores as weights of a mean, ``[B, N]`` float32: what has none has next to none.

    Args:
        score: ``[B, N]``.
        size: ``[B, N]``, 0 for tokens out of use, which weigh nothing.
    """
    size = each_image(size, *score.shape)
    with torch.no_grad():
        weight = torch.where(score.isnan(), 0.0, score).float().clamp(min=1e-20)
        return weight if size is None else torch.where(size < PADDED, size, weight)


@register("let_go(Tensor assign, Tensor dropped) -> Tensor")
def let_go(assign: Tensor, dropped: Tensor) -> Tensor:
    """``[B, N]`` indices with -1 for the tokens at ``[B, K]`` positions."""
    return assign.scatter(1, dropped, torch.full_like(dropped, -1))


@register("counted(Tensor? size, Tensor dropped, SymInt tokens) -> Tensor")
def counted(size: Tensor | None, dropped: Tensor, tokens: int) -> Tensor:
    """Sizes ``[B, N]`` float32, 0 for the tokens at ``[B, K]`` positions."""
    blank = torch.zeros_like(dropped, dtype=torch.float32)
    if size is None:
        size = torch.ones(dropped.shape[0], tokens, dtype=torch.float32, device=dropped.device)
    size = each_image(size, dropped.shape[0], tokens).to(torch.float32)
    return size.scatter(1, dropped, blank)
