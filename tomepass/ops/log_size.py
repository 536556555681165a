"""``tome::log_size``: the bias of proportional attention."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.library import at_least_float32, register, without_autocast


@register("log_size(Tensor size, Tensor query) -> Tensor")
def log_size(size: Tensor, query: Tensor) -> Tensor:
    """log(size) as an attention bias: softmax(q k^T scale + log size) (ToMe, eq. 1).

    Args:
        size: ``[B, N]`` float32, of the keys.
        query: gives the dtype: a bias of another dtype is refused or wrong in some kernels.

    Returns:
        ``[B, 1, 1, N]`` in the dtype of ``query``.
    """
    with torch.no_grad(), without_autocast(size.device):
        wide = size.to(at_least_float32(query.dtype))
        return wide.log().to(query.dtype)[:, None, None, :]
