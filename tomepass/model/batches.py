"""Which inputs of a call are batched, and the call remade to be captured for any batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from tomepass.errors import NotCaptured


@dataclass(frozen=True)
class Form:
    """How a capture takes the batch.

    Args:
        alone: the first tensor alone is batched, whatever the sizes of the others are. Else those
            are that begin with the same size.
        size: the one batch size that it holds for, nothing then being batched; None for any.
    """

    alone: bool = False
    size: int | None = None

    def batched(self, value: Tensor, first: Tensor | None) -> bool:
        """Is a tensor of a call batched, given the first one that has dimensions?"""
        if first is None or not value.ndim or self.size is not None:
            return False
        return value is first or (not self.alone and value.shape[0] == first.shape[0])

    def remade(self, call: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A call with a batch of 2, if it may have any, and its dynamic shapes for
        ``torch.export``.
        """
        if (first := first_of(call)) is None:
            raise NotCaptured("no tensor among the inputs, so there is no batch to capture with")
        _check_dense(call)
        dimension = torch.export.Dim("batch", min=1)

        def two(value: Any) -> Any:
            return (
                _two(value) if isinstance(value, Tensor) and self.batched(value, first) else value
            )

        def shape(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return None
            return {0: dimension} if self.batched(value, first) else {}

        return pytree.tree_map(two, call), pytree.tree_map(shape, call)

    def rows(self, call: dict[str, Any], places: Any) -> dict[str, Any]:
        """A call for some of its images: their places, or a slice."""
        first = first_of(call)

        def chosen(leaf: Any) -> Any:
            batched = isinstance(leaf, Tensor) and self.batched(leaf, first)
            return leaf[places] if batched else leaf

        found: dict[str, Any] = pytree.tree_map(chosen, call)
        return found

    def few(self, call: dict[str, Any]) -> dict[str, Any]:
        """The first and the last of a call's inputs; all where the size is fixed."""
        return self.remade(call)[0]


ANY = Form()

ALONE = Form(alone=True)


def forms(call: dict[str, Any]) -> list[Form]:
    """The ways to capture a call, the best first.

    An input that is not batched may happen to be as long as the batch; and a batch that decides
    about the graph cannot be left open.
    """
    first = first_of(call)
    if first is None:
        return [ANY]
    tensors = [v for v in pytree.tree_leaves(call) if isinstance(v, Tensor) and v is not first]
    doubtful = any(ANY.batched(value, first) for value in tensors)
    fixed = Form(alone=True, size=first.shape[0])
    return [ANY, ALONE, fixed] if doubtful else [ANY, fixed]


def first_of(call: Any) -> Tensor | None:
    """The first tensor that has dimensions: its first one is the batch."""
    return next((v for v in pytree.tree_leaves(call) if isinstance(v, Tensor) and v.ndim), None)


def _check_dense(call: dict[str, Any]) -> None:
    """Refuses inputs that no graph of dense operators can take."""
    for value in pytree.tree_leaves(call):
        if isinstance(value, Tensor) and (value.is_nested or value.layout is not torch.strided):
            kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            raise NotCaptured(
                f"expected dense tensors as inputs, got a {kind} one of {value.dtype}",
                advice="call to_dense() on it first; a nested tensor must be padded",
            )


def _two(value: Tensor) -> Tensor:
    if value.shape[0] == 0:
        return value.new_zeros((2, *value.shape[1:]))
    # What wants gradients still does, since a model may ask.
    return torch.cat([value[:1], value[-1:]]).detach().requires_grad_(value.requires_grad)
