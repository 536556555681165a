"""What operators take, checked where it would otherwise be read wrongly: ranks, lengths, dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor


@overload
def each_image(size: Tensor, batch: int, tokens: int, name: str = "size") -> Tensor: ...


@overload
def each_image(size: None, batch: int, tokens: int, name: str = "size") -> None: ...


def each_image(size: Tensor | None, batch: int, tokens: int, name: str = "size") -> Tensor | None:
    """Sizes of every image, ``[B, N]``: those of a single row ``[1, N]`` are the same for all.

    Raises:
        ValueError: if there is not one number a token, for one image or for each.
    """
    if size is None:
        return None
    if size.ndim != 2 or size.shape[1] != tokens or size.shape[0] not in (1, batch):
        raise ValueError(f"expected {name} [{batch}, {tokens}], got {list(size.shape)}")
    return size if size.shape[0] == batch else size.expand(batch, tokens)


def check_heads(x: Tensor, name: str = "keys") -> None:
    """Raises ValueError if keys or other features are not ``[B, H, N, D]``."""
    if x.ndim != 4:
        raise ValueError(f"expected {name} [B, H, N, D], got {list(x.shape)}")


def check_tokens(x: Tensor) -> None:
    """Raises ValueError if tokens are not ``[B, N, C]``."""
    if x.ndim != 3:
        raise ValueError(f"expected tokens [B, N, C], got {list(x.shape)}")


def check_map(index: Tensor, lengths: Sequence[int] | None = None, name: str = "assign") -> None:
    """Raises ValueError if an index map is not ``[B, N]`` int64, of these lengths if any."""
    known = lengths is None or list(index.shape) == list(lengths)
    if index.ndim != 2 or not known:
        wanted = "[B, N]" if lengths is None else f"{list(lengths)}"
        raise ValueError(f"expected {name} {wanted}, got {list(index.shape)}")
    if index.dtype is not torch.int64:
        raise ValueError(f"expected {name} of torch.int64, got {index.dtype}")


def held_positions(tokens: int, protected: Sequence[int]) -> list[int]:
    """The protected positions, ascending, each once.

    Raises:
        ValueError: if the sequence has no such position.
    """
    held = sorted(set(protected))
    if held and not (held[0] >= 0 and held[-1] < tokens):
        raise ValueError(f"{tokens} tokens have no protected positions {held}")
    return held
