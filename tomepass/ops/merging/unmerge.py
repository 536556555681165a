"""``tome::unmerge`` and the source map behind it: the way back to the original tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.library import register
from tomepass.ops.positions import gather, take, without


@register("unmerge(Tensor x, Tensor source, int dim) -> Tensor")
def unmerge(x: Tensor, source: Tensor, dim: int) -> Tensor:
    """Gives each original position the value of the token that holds it.

    Args:
        x: batch first, merged tokens on ``dim``.
        source: ``[B, N]``, the index of each original token in the merged sequence.
        dim: the token dimension of ``x``, 1 or more.

    Returns:
        ``x`` with N tokens on ``dim``.
    """
    return gather(x, source, dim)


@register("compose(Tensor? source, Tensor assign) -> Tensor")
def compose(source: Tensor | None, assign: Tensor) -> Tensor:
    """The source map after one more merge: ``[B, N]`` and ``[B, N_in]`` to ``[B, N]``."""
    return assign if source is None else gather(assign, source, 1)


@register("compose_held(Tensor? held, Tensor assign) -> Tensor")
def compose_held(held: Tensor | None, assign: Tensor) -> Tensor:
    """As :func:`compose`, where -1 is a token that was dropped: it stays dropped."""
    if held is None:
        return assign
    return torch.where(held < 0, held, gather(assign, held.clamp(min=0), 1))


@register("narrow_source(Tensor source, int[] positions, int[] removed) -> Tensor")
def narrow_source(source: Tensor, positions: list[int], removed: list[int]) -> Tensor:
    """The source map of a sequence some protected tokens were sliced off.

    Args:
        source: ``[B, N]`` for the whole sequence.
        positions: original positions that are left, ascending.
        removed: indices, in the merged sequence, of the tokens sliced off.

    Returns:
        ``[B, len(positions)]``.
    """
    return without(take(source, positions), removed)
