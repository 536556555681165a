"""``tome::match_threshold``: bipartite matching of every pair that is similar enough."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.library import at_least_float32, register, without_autocast
from tomepass.ops.match import check_r, free_positions, rank
from tomepass.ops.padding import PADDED
from tomepass.ops.positions import constant, sent, take


@register(
    "match_threshold(Tensor keys, SymInt r, int[] protected, Tensor? size, float tau) "
    "-> (Tensor, Tensor)"
)
def match_threshold(
    keys: Tensor, r: int, protected: list[int], size: Tensor | None, tau: float
) -> tuple[Tensor, Tensor]:
    """Where each token goes, as ``tome::match`` says, and every more similar one besides.

    Even positions draw one edge each to the odd position most similar to them. The ``r`` largest
    edges merge, and so do all others above ``tau``: what these leave is a place that nothing goes
    to. Ties go to the lower position. No gradient flows through a matching.

    Args:
        keys: ``[B, H, N, D]``, as attention sees them; the head mean is compared by cosine.
        r: tokens to lose, already capped.
        protected: positions that neither merge nor are merged into.
        size: ``[B, N]``, given where some tokens are padding or out of use: these are lost first,
            and merge with their own kind, as long as there are some left to merge with.
        tau: the similarity above which tokens merge.

    Returns:
        ``[B, N]`` int64, each token's index in the sequence of N - r: the protected tokens, the
        even ones that were not lost, the odd ones, each by position; and ``[B, N - r]`` int64, the
        position of the token that stands there: of several the odd one.

    Raises:
        ValueError: if ``r`` is more than can merge.
    """
    batch, _, tokens, _ = keys.shape
    even, odd, held = free_positions(tokens, protected)
    check_r(r, tokens, held)
    sources, destinations = (constant(p, batch, keys.device) for p in (even, odd))
    with torch.no_grad(), without_autocast(keys.device):
        metric = torch.nn.functional.normalize(
            keys.to(at_least_float32(keys.dtype)).mean(1), dim=-1
        )
        scores = take(metric, even) @ take(metric, odd).transpose(1, 2)
        scores = torch.where(scores.isnan(), -float("inf"), scores)
        idle = torch.zeros_like(sources, dtype=torch.bool)
        if size is not None:
            # Tokens, padding and what is out of use each keep to themselves: 2, 1 and 0.
            kind, kind_odd = (_kind(take(size, places)) for places in (even, odd))
            apart = kind.unsqueeze(2) != kind_odd.unsqueeze(1)
            scores = torch.where(apart, -float("inf"), scores)
            idle = kind < 2
        similarity, partner = scores.max(dim=-1)
        lost = rank(torch.where(idle, float("inf"), similarity)) < r
        merged = lost | (~idle & (similarity > tau))
    first = len(held) + len(even) - r
    place = len(held) + torch.arange(len(even), device=keys.device) - lost.cumsum(-1)
    protected_places = torch.arange(len(held), device=keys.device).expand(batch, -1)
    odd_places = (first + torch.arange(len(odd), device=keys.device)).expand(batch, -1)
    # What stays is at its place, and so is what left it: only what was lost has none.
    stays = torch.cat([protected_places, torch.where(lost, -1, place), odd_places], dim=1)
    goes = torch.cat(
        [protected_places, torch.where(merged, first + partner, place), odd_places], dim=1
    )
    position = torch.cat([constant(held, batch, keys.device), sources, destinations], dim=1)
    stands = torch.where(sent(stays, tokens - r), position.unsqueeze(1), -1).amax(-1)
    return goes[:, position[0].argsort()], stands


def _kind(size: Tensor) -> Tensor:
    return (size > 0).long() + (size >= PADDED).long()
