"""Attention in which a key counts as often as the tokens it holds."""

from __future__ import annotations

from torch import Tensor


def proportional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`softmax(q kᵀ · scale + log size) v` (arXiv 2210.09461, section 3, "Tracking Token Size").

    q, k, v: `[B, H, N, D]`; size: `[B, N]` of the keys, None for plain attention; scale: 1/√D
    unless given; bias: added to the scores. Returns `[B, H, N, D]` in the dtype of q.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias.double()
    if size is not None:
        scores = scores + size.double().log()[:, None, None, :]
    return (scores.softmax(-1) @ v.double()).to(q.dtype)


def proportional_weights(scores: Tensor, size: Tensor | None) -> Tensor:
    """The attention weights alone: every key counts as often as the tokens it holds.

    scores: `[B, ..., N]`, or `[B * H, ..., N]` with the heads folded in; size: `[B, N]`.
    """
    exponential = (scores.double() - scores.double().amax(-1, keepdim=True)).exp()
    if size is not None:
        heads = scores.shape[0] // size.shape[0]
        count = size.double().repeat_interleave(heads, dim=0)
        exponential *= count.reshape(count.shape[0], *[1] * (scores.ndim - 2), count.shape[1])
    return (exponential / exponential.sum(-1, keepdim=True)).to(scores.dtype)


def attention_to(
    q: Tensor, k: Tensor, size: Tensor | None, queries: tuple[int, ...], scale: float
) -> Tensor:
    """The attention each token gets, the mean over heads and over `queries` (all, if empty).

    q: `[B, H, N, D]`; k: `[B, H', N, D]`, each shared by H / H' heads. Returns `[B, N]` float64.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    weights = proportional_weights(q.double() @ k.double().transpose(-1, -2) * scale, size)
    return weights[:, :, list(queries) or slice(None)].mean((1, 2))
