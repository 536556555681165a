"""``tome::merge_max`` and ``tome::mlerp``: other ways to make one token of several."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.arguments import check_map, check_tokens, each_image
from tomepass.ops.library import register, without_autocast
from tomepass.ops.merging.merge import Means
from tomepass.ops.padding import PADDED


@register("merge_max(Tensor x, Tensor assign, SymInt tokens, Tensor? size=None) -> Tensor")
def merge_max(x: Tensor, assign: Tensor, tokens: int, size: Tensor | None = None) -> Tensor:
    """The largest of each channel over the tokens sent to each index (ToMe, table 1).

    Args:
        x: ``[B, N, C]``.
        assign: ``[B, N]``, as ``tome::match`` returns it.
        tokens: N' of the result.
        size: ``[B, N]``, given where some tokens are padding, which have no say among others.

    Returns:
        ``[B, N', C]`` in the dtype of ``x``.

    Raises:
        ValueError: if sizes or indices are not one a token.
    """
    check_tokens(x)
    check_map(assign, x.shape[:2])
    index = assign.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    blank = x.new_zeros(x.shape[0], tokens, x.shape[-1])

    def largest(of: Tensor) -> Tensor:
        return blank.scatter_reduce(1, index, of, "amax", include_self=False)

    size = each_image(size, *x.shape[:2])
    if size is None:
        return largest(x)
    seen = largest(torch.where((size < PADDED).unsqueeze(-1), -float("inf"), x))
    return torch.where(seen == -float("inf"), largest(x), seen)


@register("mlerp(Tensor x, Tensor? size, Tensor assign, SymInt tokens, str norm) -> Tensor")
def mlerp(x: Tensor, size: Tensor | None, assign: Tensor, tokens: int, norm: str) -> Tensor:
    """A mean direction with a preserved norm (MLERP of ToFu, arXiv 2312.01026, section 3.3).

    Args:
        x: ``[B, N, C]``.
        size: ``[B, N]``, the weights, or ``[1, N]`` for all images; None for all ones.
        assign: ``[B, N]`` int64, as ``tome::match`` returns it.
        tokens: N' of the result.
        norm: ``"max"``: the weighted mean, at the greatest norm among its tokens; ``"mean"``: the
            weighted mean of the directions, at the weighted mean of the norms.

    Returns:
        ``[B, N', C]`` in the dtype of ``x``. A token by itself and equal ones stay as they are; 0
        where no token goes, or none of any size.

    Raises:
        ValueError: if sizes or indices are not one a token.
    """
    with without_autocast(x.device):
        means = Means(x, size, assign, tokens)
        wide = means.wide
        length = torch.linalg.vector_norm(wide, dim=-1)
        weight = means.weight
        with torch.no_grad():
            # What is out of use has no say, nor has padding beside what is none.
            goes = weight > PADDED**2
            # One by itself, and equal ones, stay what they are to the bit.
            apart = (goes & (means.offset != 0).any(-1).unsqueeze(1)).any(-1, keepdim=True)
        if norm == "max":
            direction = means.mean
            goal = torch.where(goes, length.unsqueeze(1), 0.0).amax(-1)
        else:
            direction = weight @ (wide / length.clamp(min=_SHORT).unsqueeze(-1))
            goal = (weight @ length.unsqueeze(-1)).squeeze(-1)
        reached = torch.linalg.vector_norm(direction, dim=-1).clamp(min=_SHORT)
        made = direction * (goal / reached).unsqueeze(-1)
        return torch.where(apart, made, means.mean).to(x.dtype)


_SHORT = 1e-12
