"""``tome::merge`` and ``tome::merge_size``: the size-weighted mean of merged tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.arguments import check_map, check_tokens, each_image
from tomepass.ops.library import at_least_float32, register, without_autocast
from tomepass.ops.positions import gather, sent


@register("merge(Tensor x, Tensor? size, Tensor assign, SymInt tokens) -> Tensor")
def merge(x: Tensor, size: Tensor | None, assign: Tensor, tokens: int) -> Tensor:
    """``x_out = sum(size * x) / sum(size)`` over the tokens sent to each index (ToMe, section 3).

    Args:
        x: ``[B, N, C]``.
        size: ``[B, N]``, or ``[1, N]`` for all images; None for all ones.
        assign: ``[B, N]`` int64, as ``tome::match`` returns it.
        tokens: N' of the result.

    Returns:
        ``[B, N', C]`` in the dtype of ``x``, summed in float32 or wider and rounded once; equal
        tokens to the bit what they were; 0 where no token goes, or none of any size.

    Raises:
        ValueError: if sizes or indices are not one a token.
    """
    with without_autocast(x.device):
        return Means(x, size, assign, tokens).mean.to(x.dtype)


class Means:
    """The weighted means of the tokens sent to each index.

    Args:
        x: ``[B, N, C]``.
        size: ``[B, N]``, ``[1, N]`` or None.
        assign: ``[B, N]`` int64; what is no index goes nowhere.
        tokens: N'.

    Attributes:
        wide: ``x`` in float32 or wider, as the rest.
        weight: ``[B, N', N]``, what each token counts at each index: they sum to 1, or to 0 where
            no token goes, or none of any size.
        offset: ``[B, N, C]``, how far each token is from one of those that it is merged with.
        mean: ``[B, N', C]``.
    """

    def __init__(self, x: Tensor, size: Tensor | None, assign: Tensor, tokens: int) -> None:
        check_tokens(x)
        check_map(assign, x.shape[:2])
        if tokens < 1:
            raise ValueError(f"expected tokens to be left, got {tokens}")
        self.wide = x.to(at_least_float32(x.dtype))
        with torch.no_grad():
            sizes = _sizes(size, assign, tokens, self.wide.dtype)
            total = sizes.sum(-1, keepdim=True)
            # Nothing goes to a place out of use: it is 0 there, not 0 / 0.
            self.weight = sizes / total.masked_fill(total <= 0, float("inf"))
            stands = standing(sizes)
            own = gather(x, stands.clamp(min=0), 1)
            near = gather(own, assign.clamp(0, tokens - 1), 1)
            own = torch.where((stands >= 0).unsqueeze(-1), own, 0.0).to(self.wide.dtype)
        # One matmul with the weights: deterministic, differentiable, exports anywhere. It goes over
        # what is between the tokens, so that no weight is rounded where there is nothing. The
        # weights sum to 1: the gradients of ``own`` would cancel out.
        self.offset = near.to(self.wide.dtype) - self.wide
        self.mean = own - self.weight @ self.offset


@register("merge_size(Tensor? size, Tensor assign, SymInt tokens) -> Tensor")
def merge_size(size: Tensor | None, assign: Tensor, tokens: int) -> Tensor:
    """``size_out = sum(size)``: ``[B, N]``, ``[1, N]`` or None to ``[B, N']``, float32."""
    check_map(assign)
    with torch.no_grad(), without_autocast(assign.device):
        return _sizes(size, assign, tokens, torch.float32).sum(-1)


def standing(sizes: Tensor) -> Tensor:
    """The last token of any size that goes to each index, ``[B, N', N]`` to ``[B, N']`` int64.

    -1 where there is none.
    """
    position = torch.arange(sizes.shape[-1], device=sizes.device, dtype=torch.int32)
    return torch.where(sizes > 0, position, -1).amax(-1).long()


def _sizes(size: Tensor | None, assign: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    # [B, N', N]: row j holds the sizes of the tokens sent to j.
    goes = sent(assign, tokens)
    if size is None:
        return goes.to(dtype)
    return torch.where(goes, each_image(size, *assign.shape).to(dtype).unsqueeze(1), 0.0)
