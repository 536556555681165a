"""``tome::log_size``: the bias of proportional attention."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.library import at_least_float32, register, without_autocast
from tomepass.ops.padding import PADDED


@register("log_size(Tensor size, Tensor like, int dim=3, int fold=1) -> Tensor")
def log_size(size: Tensor, like: Tensor, dim: int = 3, fold: int = 1) -> Tensor:
    """log(size) as an attention bias: softmax(q k^T scale + log size) (ToMe, eq. 1).

    Args:
        size: ``[B, N]`` of the keys, or ``[1, N]`` for all images. Padding has next to none and
            is left out.
        like: gives the dtype, as a bias of another is refused or wrong in some kernels, and the
            number of dimensions: the scores, or the query of a fused attention.
        dim: where the keys stand among the dimensions.
        fold: heads folded into the batch dimension of ``like``.

    Returns:
        ``[B * fold, 1, ..., N, ..., 1]`` in the dtype of ``like``, N on ``dim``; ``[1, 1, ...]``
        for sizes of all images.

    Raises:
        ValueError: if sizes are not ``[B, N]``.
    """
    if size.ndim != 2:
        raise ValueError(f"expected size [B, N], got {list(size.shape)}")
    with torch.no_grad(), without_autocast(size.device):
        wide = size.to(at_least_float32(like.dtype)).log().to(like.dtype)
        wide = wide.masked_fill(size < PADDED, torch.finfo(like.dtype).min)
        if fold > 1 and size.shape[0] != 1:
            wide = wide[:, None].expand(-1, fold, -1).flatten(0, 1)
        shape = [1] * like.ndim
        shape[0], shape[dim] = wide.shape
        return wide.view(shape)
