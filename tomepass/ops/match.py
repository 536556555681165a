"""``tome::match``: bipartite soft matching, from attention keys to an index map."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.library import register, without_autocast


@register("match(Tensor keys, SymInt r, int[] protected) -> Tensor")
def match(keys: Tensor, r: int, protected: list[int]) -> Tensor:
    """Where each token goes (ToMe, arXiv 2210.09461, section 3).

    The metric is the head mean of the keys, compared by cosine. Even positions draw one edge
    each to the odd position most similar to them; the ``r`` largest edges merge. Ties go to
    the lower position. No gradient flows through a matching.

    Args:
        keys: ``[B, H, N, D]``, as attention sees them.
        r: tokens to merge, already capped.
        protected: positions that neither merge nor are merged into.

    Returns:
        ``[B, N]`` int64: for each token its index in the merged sequence, whose order is the
        protected tokens, the unmerged even ones, then the odd ones, each by position.
    """
    tokens = keys.shape[2]
    held = set(protected)
    even = [i for i in range(0, tokens, 2) if i not in held]
    odd = [i for i in range(1, tokens, 2) if i not in held]
    with without_autocast(keys.device), torch.no_grad():
        metric = torch.nn.functional.normalize(keys.detach().float().mean(1), dim=-1)
        scores = take(metric, even) @ take(metric, odd).transpose(1, 2)
        scores = torch.where(scores.isnan(), -float("inf"), scores)
        similarity, partner = scores.max(dim=-1)
        merged = rank(similarity) < r
        # A token that stays moves up by the merged ones before it.
        stays = torch.arange(len(even), device=keys.device) - (merged.cumsum(-1) - merged.long())
        first_odd = len(protected) + len(even) - r
        even_index = torch.where(merged, first_odd + partner, len(protected) + stays)
        return _in_sequence(even_index, even, odd, list(protected), first_odd)


def rank(similarity: Tensor) -> Tensor:
    """Place of each edge, ``[B, A]``: 0 the largest; ties by position.

    Counting the edges before each one needs no sort and fuses into one reduction.
    """
    edges = similarity.shape[-1]
    position = torch.arange(edges, device=similarity.device)
    other, this = similarity.unsqueeze(-2), similarity.unsqueeze(-1)
    before = (other > this) | ((other == this) & (position[None, :] < position[:, None]))
    return before.sum(-1)


def take(x: Tensor, positions: list[int], dim: int = 1) -> Tensor:
    """``x`` at fixed positions, by a strided slice where they are evenly spaced."""
    if not positions:
        return x.narrow(dim, 0, 0)
    step = positions[1] - positions[0] if len(positions) > 1 else 1
    if step > 0 and positions == list(range(positions[0], positions[-1] + 1, step)):
        return torch.ops.aten.slice.Tensor(x, dim, positions[0], positions[-1] + 1, step)
    return x.index_select(dim, torch.tensor(positions, device=x.device))


def _in_sequence(
    even_index: Tensor, even: list[int], odd: list[int], protected: list[int], first_odd: int
) -> Tensor:
    # Concatenated by kind, then put back at the positions the tokens came from.
    device, batch = even_index.device, even_index.shape[0]
    by_kind = torch.cat(
        [
            torch.arange(len(protected), device=device).expand(batch, -1),
            even_index,
            (first_odd + torch.arange(len(odd), device=device)).expand(batch, -1),
        ],
        dim=1,
    )
    order = protected + even + odd
    back = sorted(range(len(order)), key=order.__getitem__)
    return by_kind.index_select(1, torch.tensor(back, device=device))
