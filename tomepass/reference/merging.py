"""What becomes of tokens that share a place, and the way back to the original positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge(x: Tensor, size: Tensor, assign: Tensor, n_out: int) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of the tokens that share a place (arXiv 2210.09461, section 3).

    x: `[B, N, C]`; size: `[B, N]`, positive: original tokens held by each; assign: `[B, N]` of
    `match`; n_out: tokens after it. Returns `[B, n_out, C]` and `[B, n_out]`, dtypes as given.
    """
    merged, sizes = [], []
    for tokens, weight, place in zip(x.double(), size.double(), assign, strict=True):
        total = weight.new_zeros(n_out).index_add(0, place, weight)
        weighted = tokens * weight[:, None]
        summed = tokens.new_zeros(n_out, tokens.shape[-1]).index_add(0, place, weighted)
        merged.append(summed / total[:, None])
        sizes.append(total)
    return torch.stack(merged).to(x.dtype), torch.stack(sizes).to(size.dtype)


def combine(x: Tensor, size: Tensor, assign: Tensor, n_out: int, how: str) -> Tensor:
    """Other ways than the weighted mean to make one token of several (table 1; ToFu, MLERP).

    x: `[B, N, C]`; size: `[B, N]`; assign: `[B, N]` of `match`; how: "mean", "max" of each
    channel, "mlerp_max" (the weighted mean at the greatest norm), or "mlerp_mean" (the weighted
    mean of the directions at the weighted mean of the norms). Returns `[B, n_out, C]`.
    """
    images = []
    for tokens, weight, places in zip(x.double(), size.double(), assign, strict=True):
        made = []
        for place in range(n_out):
            group, w = tokens[places == place], weight[places == place, None]
            norms = group.norm(dim=-1, keepdim=True)
            if how == "mean" or len(group) == 1:
                one = group.mean(0)
            elif how == "max":
                one = group.amax(0)
            elif how == "mlerp_max":
                mean = (w * group).sum(0) / w.sum()
                one = mean / mean.norm() * norms.max()
            else:
                direction = (w * group / norms).sum(0)
                one = direction / direction.norm() * (w * norms).sum() / w.sum()
            made.append(one)
        images.append(torch.stack(made))
    return torch.stack(images).to(x.dtype)


def compose(assign: Tensor, source: Tensor) -> Tensor:
    """Follow one more merge: `assign [B, N']` of it, `source [B, N]` up to it -> `[B, N]`."""
    return torch.stack([a[s] for a, s in zip(assign, source, strict=True)])


def unmerge(x: Tensor, source: Tensor) -> Tensor:
    """Give every original position the value of the token that holds it.

    x: `[B, N', C]`; source: `[B, N]`, the place in x of each original token. Returns `[B, N, C]`.
    """
    return torch.stack([tokens[place] for tokens, place in zip(x, source, strict=True)])


def merged_rows(table: Tensor, source: Tensor, n_out: int) -> Tensor:
    """The mean of the rows of `table [1 or B, N, C]` that share a place of `source [B, N]`."""
    wide = table.expand(source.shape[0], *table.shape[-2:])
    return merge(wide, torch.ones(source.shape, device=source.device), source, n_out)[0]


def merged_bias(bias: Tensor, source: Tensor, n_out: int) -> Tensor:
    """A position bias among original tokens, for merged ones.

    bias: `[1 or B, 1 or H, N, N]`; source: `[B, N]`. Several keys in one weigh together what
    they weighed apart, `log Σ exp` less the log of their number; a query made of several has
    their mean. Returns `[B, 1 or H, n_out, n_out]`.
    """
    images = []
    for image, places in enumerate(source):
        one = bias[image if bias.shape[0] > 1 else 0].double()
        columns = [one[..., places == j] for j in range(n_out)]
        one = torch.stack([c.logsumexp(-1) - math.log(c.shape[-1]) for c in columns], dim=-1)
        rows = [one[..., places == i, :].mean(-2) for i in range(n_out)]
        images.append(torch.stack(rows, dim=-2))
    return torch.stack(images).to(bias.dtype)
