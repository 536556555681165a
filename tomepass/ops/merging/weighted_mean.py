"""``tome::weighted_mean``: a mean over tokens that counts every token's size."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.arguments import each_image
from tomepass.ops.library import at_least_float32, register, without_autocast
from tomepass.ops.positions import gather


@register("weighted_mean(Tensor x, Tensor size, int dim, bool keepdim) -> Tensor")
def weighted_mean(x: Tensor, size: Tensor, dim: int, keepdim: bool) -> Tensor:
    """``sum(size * x) / sum(size)`` over the tokens: what the mean was before merging.

    Args:
        x: batch first, tokens on ``dim``.
        size: ``[B, N]``, or ``[1, N]`` for all images.
        dim: the token dimension, 1 or more.
        keepdim: keep it with size 1.

    Returns:
        the mean in the dtype of ``x``, summed in float32 or wider; of equal tokens what they are,
        to the bit.

    Raises:
        ValueError: if there is not one size a token.
    """
    sizes = each_image(size, x.shape[0], x.shape[dim])
    shape = [1] * x.ndim
    shape[0], shape[dim] = sizes.shape
    with without_autocast(x.device):
        wide = x.to(at_least_float32(x.dtype))
        with torch.no_grad():
            sizes = sizes.to(wide.dtype)
            weight = (sizes / sizes.sum(-1, keepdim=True)).reshape(shape)
            # What is summed is how far tokens are from the largest: nothing, where they are equal.
            # The weights sum to 1: its gradients would cancel out.
            own = gather(wide, sizes.argmax(-1, keepdim=True), dim)
        mean: Tensor = own - ((own - wide) * weight).sum(dim, keepdim=True)
        return (mean if keepdim else mean.squeeze(dim)).to(x.dtype)
