"""``tome::weighted_mean``: a mean over tokens that counts every token's size."""

from __future__ import annotations

from torch import Tensor

from tomepass.ops.library import at_least_float32, register, without_autocast


@register("weighted_mean(Tensor x, Tensor size, int dim, bool keepdim) -> Tensor")
def weighted_mean(x: Tensor, size: Tensor, dim: int, keepdim: bool) -> Tensor:
    """``sum(size * x) / sum(size)`` over the tokens: what the mean was before merging.

    Args:
        x: batch first, tokens on ``dim``.
        size: ``[B, N]`` float32.
        dim: the token dimension, 1 or more.
        keepdim: keep it with size 1.

    Returns:
        the mean in the dtype of ``x``; summed in float32 or wider.
    """
    shape = [1] * x.ndim
    shape[0], shape[dim] = size.shape
    with without_autocast(x.device):
        wide = size.to(at_least_float32(x.dtype))
        weight = (wide / wide.sum(-1, keepdim=True)).reshape(shape)
        return (x * weight).sum(dim, keepdim).to(x.dtype)
