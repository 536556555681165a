"""Proportional attention in other exact spellings than a bias, for kernels that refuse or slow it.

Each is ``softmax(q k^T scale + log size) v``, made of fused attentions without a bias, or with one
of cuDNN's. Which one a device takes stands in ``tomepass/attention_gpu.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tomepass.ops.arguments import each_image
from tomepass.ops.attending.log_size import log_size
from tomepass.ops.library import at_least_float32, register, without_autocast

_SCHEMA = "(Tensor query, Tensor key, Tensor value, Tensor size, float? scale=None) -> Tensor"

# Fused kernels want widths of whole 16 bytes.
_MULTIPLE = 8


# Below what a sum of weights can hold: a token of no size weighs nothing, and its log is a number.
_LEAST = 1e-30


@register(f"attend_channel{_SCHEMA}")
def attend_channel(
    query: Tensor, key: Tensor, value: Tensor, size: Tensor, scale: float | None = None
) -> Tensor:
    """log(size) as two more channels of the keys, which the queries hold ones for.

    The second holds what rounding the first cut off, so that the sum is nearer to log(size) than
    a bias in a narrow dtype.

    Args:
        query: ``[B, H, N, D]``.
        key: ``[B, H, N', D]``.
        value: ``[B, H, N', D]``.
        size: ``[B, N']`` of the keys, or ``[1, N']`` for all images.
        scale: of the scores; None for the root of 1 / D.

    Returns:
        ``[B, H, N, D]`` in the dtype of ``query``.
    """
    size = each_image(size, *key.shape[::2])
    width = query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    with torch.no_grad(), without_autocast(size.device):
        log = size.to(at_least_float32(key.dtype)).clamp(min=_LEAST).log() / scale
        coarse = log.to(key.dtype)
        parts = torch.stack([coarse, (log - coarse).to(key.dtype)], dim=-1)
        parts = F.pad(parts, (0, -(width + 2) % _MULTIPLE))
        parts = parts.unsqueeze(1).expand(-1, key.shape[1], -1, -1)
        ones = query.new_ones(()).expand(*query.shape[:3], parts.shape[-1])
    attended = F.scaled_dot_product_attention(
        torch.cat([query, ones], -1),
        torch.cat([key, parts], -1),
        F.pad(value, (0, parts.shape[-1])),
        scale=scale,
    )
    return attended[..., :width]


@register(f"attend_scaled{_SCHEMA}")
def attend_scaled(
    query: Tensor, key: Tensor, value: Tensor, size: Tensor, scale: float | None = None
) -> Tensor:
    """Values times sizes, and the sizes as a column of theirs that gives the denominator.

    Sizes are taken relative to the greatest of an image, which keeps float16 from overflowing.
    Arguments and result are those of :func:`attend_channel`.
    """
    size = each_image(size, *key.shape[::2])
    width = query.shape[-1]
    scale = width**-0.5 if scale is None else scale
    with torch.no_grad(), without_autocast(size.device):
        share = size.to(at_least_float32(value.dtype))
        share = (share / share.amax(-1, keepdim=True)).to(value.dtype)[:, None, :, None]
        share = share.expand(*value.shape[:3], 1)
    more = 1 + -(width + 1) % _MULTIPLE
    attended = F.scaled_dot_product_attention(
        F.pad(query, (0, more)),
        F.pad(key, (0, more)),
        F.pad(torch.cat([value * share, share], -1), (0, more - 1)),
        scale=scale,
    )
    return attended[..., :width] / attended[..., width : width + 1]


@register(f"attend_cudnn{_SCHEMA}")
def attend_cudnn(
    query: Tensor, key: Tensor, value: Tensor, size: Tensor, scale: float | None = None
) -> Tensor:
    """log(size) as a bias of cuDNN's kernel, which PyTorch would not choose of itself.

    The bias has the dtype of the queries: one of another has been silently wrong. Arguments and
    result are those of :func:`attend_channel`; CUDA, float16 and bfloat16 only.
    """
    size = each_image(size, *key.shape[::2])
    with torch.no_grad():
        bias = log_size(size, query).expand(*query.shape[:3], key.shape[2])
    needs = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    attended: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, bias, needs, 0.0, False, False, scale=scale
    )[0]
    return attended
