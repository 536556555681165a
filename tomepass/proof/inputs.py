"""The inputs of a check in other forms: in other precision, and with other neighbours."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def at_least_two(call: dict[str, Any], images: int) -> dict[str, Any]:
    def doubled(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.ndim and value.shape[0] == images
        return torch.cat([value, value]) if batched else value

    return call if images > 1 else dict(pytree.tree_map(doubled, call))


def other_neighbours(value: Any) -> Any:
    """The first image as it is, the others replaced."""
    if not isinstance(value, Tensor) or not value.ndim or not value.is_floating_point():
        return value
    return torch.cat([value[:1], -1.5 * value[1:].flip(0) + 0.25])
