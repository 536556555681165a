"""``tome::merge`` and ``tome::merge_size``: the size-weighted mean of merged tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.library import at_least_float32, register, without_autocast
from tomepass.ops.positions import sent


@register("merge(Tensor x, Tensor? size, Tensor assign, SymInt tokens) -> Tensor")
def merge(x: Tensor, size: Tensor | None, assign: Tensor, tokens: int) -> Tensor:
    """``x_out = sum(size * x) / sum(size)`` over the tokens sent to each index (ToMe, section 3).

    Args:
        x: ``[B, N, C]``.
        size: ``[B, N]`` float32, or None for all ones.
        assign: ``[B, N]``, as ``tome::match`` returns it.
        tokens: N' of the result.

    Returns:
        ``[B, N', C]`` in the dtype of ``x``; 0 where no token goes, or none of any size.
    """
    # One matmul with the normalised weights: deterministic, differentiable, exports anywhere.
    with without_autocast(x.device):
        with torch.no_grad():
            weight = _weights(size, assign, tokens).to(at_least_float32(x.dtype))
            total = weight.sum(-1, keepdim=True)
            # Nothing goes to a place out of use: it is 0 there, not 0 / 0.
            weight = (weight / total.clamp(min=torch.finfo(weight.dtype).tiny)).to(x.dtype)
        return weight @ x


@register("merge_size(Tensor? size, Tensor assign, SymInt tokens) -> Tensor")
def merge_size(size: Tensor | None, assign: Tensor, tokens: int) -> Tensor:
    """``size_out = sum(size)``: ``[B, N]`` or None to ``[B, N']``, float32."""
    with torch.no_grad(), without_autocast(assign.device):
        return _weights(size, assign, tokens).sum(-1)


def _weights(size: Tensor | None, assign: Tensor, tokens: int) -> Tensor:
    # [B, N', N]: row j holds the sizes of the tokens sent to j.
    goes = sent(assign, tokens)
    return goes.float() if size is None else torch.where(goes, size.unsqueeze(1), 0.0)
