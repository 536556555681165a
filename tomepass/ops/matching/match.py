"""``tome::match``: bipartite soft matching, from attention keys to an index map."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from tomepass.counts.schedule import capped
from tomepass.ops.arguments import check_heads, each_image, held_positions
from tomepass.ops.library import register, without_autocast
from tomepass.ops.matching.similarity import comparable, head_mean, padding_first
from tomepass.ops.order import rank
from tomepass.ops.padding import PADDED
from tomepass.ops.positions import constant, take


@register("match(Tensor keys, SymInt r, int[] protected, Tensor? size=None) -> Tensor")
def match(keys: Tensor, r: int, protected: list[int], size: Tensor | None = None) -> Tensor:
    """Where each token goes (ToMe, arXiv 2210.09461, section 3).

    The metric is the head mean of the keys, compared by cosine. Even positions draw one edge
    each to the odd position most similar to them; the ``r`` largest edges merge. Ties go to
    the lower position. No gradient flows through a matching.

    Args:
        keys: ``[B, H, N, D]``, as attention sees them.
        r: tokens to merge, already capped.
        protected: positions that neither merge nor are merged into.
        size: ``[B, N]``, or ``[1, N]`` for all images, given where there is padding: it merges
            first, by position, and with padding alone, as long as there is some to merge with.
            What it holds changes nothing of where other tokens go.

    Returns:
        ``[B, N]`` int64: for each token its index in the merged sequence, whose order is the
        protected tokens, the unmerged even ones, then the odd ones, each by position. Where
        nothing merges the sequence stays as it was.

    Raises:
        ValueError: if ``r`` is more than can merge, there is no such protected position, or there
            is not one size a token.
    """
    check_heads(keys)
    batch, _, tokens, _ = keys.shape
    even, odd, held = free_positions(tokens, protected)
    check_r(r, tokens, held)
    if r == 0:
        return torch.arange(tokens, device=keys.device).repeat(keys.shape[0], 1)
    with without_autocast(keys.device), torch.no_grad():
        metric = torch.nn.functional.normalize(head_mean(keys), dim=-1)
        kinds = None
        if size is not None:
            padding = each_image(size, batch, tokens) < PADDED
            kinds = [take(padding, places) for places in (even, odd)]
        scores = comparable(take(metric, even) @ take(metric, odd).transpose(1, 2), kinds)
        similarity, partner = scores.max(dim=-1)
        merged = rank(padding_first(similarity, kinds)) < r
        # A token that stays moves up by the merged ones before it.
        stays = torch.arange(len(even), device=keys.device) - merged.cumsum(-1)
        first_odd = len(held) + len(even) - r
        even_index = torch.where(merged, first_odd + partner, len(held) + stays)
        odd_index = constant(list(range(first_odd, tokens - r)), keys.shape[0], keys.device)
        return _in_sequence(even_index, odd_index, held, tokens)


def check_r(r: int, tokens: int, protected: Sequence[int]) -> None:
    """Raises ValueError if ``r`` is more than can merge, or there is no such protected position."""
    held = held_positions(tokens, protected)
    if r != (most := capped(r, tokens, held)):
        raise ValueError(f"{most} of {tokens} tokens can merge, {len(held)} protected: got r={r}")


def free_positions(tokens: int, protected: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """The even positions that may merge, the odd ones they may merge into, the protected ones."""
    held = held_positions(tokens, protected)
    even = [i for i in range(0, tokens, 2) if i not in held]
    odd = [i for i in range(1, tokens, 2) if i not in held]
    return even, odd, held


def _in_sequence(even_index: Tensor, odd_index: Tensor, held: list[int], tokens: int) -> Tensor:
    """The indices of even, odd and protected tokens, each at the position it came from."""
    columns = []
    for parity, index in enumerate((even_index, odd_index)):
        parts, used = [], 0
        for protected, group in groupby(range(parity, tokens, 2), key=held.__contains__):
            positions = list(group)
            if protected:
                own = [held.index(p) for p in positions]
                parts.append(constant(own, index.shape[0], index.device))
            else:
                parts.append(index[:, used : used + len(positions)])
                used += len(positions)
        columns.append(torch.cat(parts, dim=1))
    even, odd = columns
    if tokens % 2:
        odd = torch.cat([odd, even[:, :1]], dim=1)  # cut off again
    return torch.stack([even, odd], dim=-1).flatten(1)[:, :tokens]
