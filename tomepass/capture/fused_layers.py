"""Replaces PyTorch's fused encoder layers by their parts, so that their attention can be found.

In eval mode without gradients ``nn.TransformerEncoder`` and ``nn.MultiheadAttention`` call one
operator for a whole layer. Here it is decomposed into linear layers, attention and LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

FUSED_LAYERS = (
    aten._transformer_encoder_layer_fwd.default,
    aten._native_multi_head_attention.default,
)


def _attention(
    x: Tensor, heads: int, qkv: tuple[Tensor, Tensor], projection: tuple[Tensor, Tensor]
) -> Tensor:
    batch, tokens, width = x.shape
    parts = F.linear(x, *qkv).view(batch, tokens, 3, heads, width // heads)
    query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
    attended = F.scaled_dot_product_attention(query, key, value)
    return F.linear(attended.transpose(1, 2).reshape(batch, tokens, width), *projection)


def encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Any:
    """One layer of ``nn.TransformerEncoder``, ``[B, N, C]``; with a mask it stays fused."""
    if mask is not None:
        return NotImplemented

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    def attend(x: Tensor) -> Tensor:
        return _attention(x, num_heads, (qkv_weight, qkv_bias), (proj_weight, proj_bias))

    def mlp(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
        return F.linear(hidden, ffn_weight_2, ffn_bias_2)

    if norm_first:
        src = src + attend(norm(src, norm_weight_1, norm_bias_1))
        return src + mlp(norm(src, norm_weight_2, norm_bias_2))
    src = norm(src + attend(src), norm_weight_1, norm_bias_1)
    return norm(src + mlp(src), norm_weight_2, norm_bias_2)


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Any:
    """Self-attention of ``nn.MultiheadAttention``; with a mask or weights asked for it stays."""
    if mask is not None or need_weights or query is not key or key is not value:
        return NotImplemented
    return _attention(query, num_head, (qkv_weight, qkv_bias), (proj_weight, proj_bias)), None


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = dict(
    zip(FUSED_LAYERS, (encoder_layer, multi_head_attention), strict=True)
)
