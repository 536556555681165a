"""Operators written out for runtimes whose converters do not take them as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def largest(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """``aten.max.dim`` as two reductions: TensorRT's converter gives one of the two results."""
    return x.amax(dim, keepdim), x.argmax(dim, keepdim)


def gathered(x: Tensor, dim: int, index: Tensor, sparse_grad: bool = False) -> Any:
    """``aten.gather`` of whole tokens by comparing places, and a product where they are rows.

    TensorRT's converter of a gather is for fixed shapes alone, so that a dynamic batch would cut
    the engine in two at every unmerge. Each image takes the same places in every channel, which
    the expanded index shows; another gather is left as it is.
    """
    dim %= max(x.ndim, 1)
    channels = [d for d in range(1, x.ndim) if d != dim]
    if dim == 0 or any(index.stride(d) and index.shape[d] != 1 for d in channels):
        return NotImplemented
    if channels and not x.is_floating_point():
        return NotImplemented
    for d in reversed(channels):
        index = index.select(d, 0)
    # [B, places, N]: which token stands at a place.
    chosen = index.unsqueeze(-1) == torch.arange(x.shape[dim], device=x.device)
    if not channels:
        return torch.where(chosen, x.unsqueeze(1), x.new_zeros(())).sum(-1, dtype=x.dtype)
    rows = x.movedim(dim, 1)
    taken = chosen.to(x.dtype) @ rows.flatten(2)
    return taken.view(*taken.shape[:2], *rows.shape[2:]).movedim(1, dim)


FOR_RUNTIMES: dict[Any, Callable[..., Any]] = {aten.max.dim: largest}
"""Written out for other runtimes, beside our own operators."""


FOR_TENSORRT: dict[Any, Callable[..., Any]] = {**FOR_RUNTIMES, aten.gather.default: gathered}
"""What torch_tensorrt is not to see as well."""
