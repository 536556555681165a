"""What lies beside the tokens, one row each, carried through merges: tables and biases."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.arguments import check_map
from tomepass.ops.library import at_least_float32, register, without_autocast
from tomepass.ops.merging.merge import merge, standing
from tomepass.ops.positions import gather, sent, without


@register("keep(Tensor? kept, Tensor assign, SymInt tokens, int[] protected) -> Tensor")
def keep(kept: Tensor | None, assign: Tensor, tokens: int, protected: list[int]) -> Tensor:
    """The original position each token stands for: of merged tokens, the one merged into.

    Args:
        kept: ``[B, N]`` before this merge, None where every token stands for itself.
        assign: ``[B, N]``, as ``tome::match`` returns it.
        tokens: N' after the merge.
        protected: positions that did not take part.

    Returns:
        ``[B, N']`` int64.
    """
    before = assign.shape[1]
    position = torch.arange(before, device=assign.device)
    # Only odd positions are merged into: where several tokens come together theirs is kept.
    into = position % 2 == 1
    for place in protected:
        into = into & (position != place)
    rank = position + before * into.long()
    chosen = torch.where(sent(assign, tokens), rank, -1).amax(-1) % before
    return chosen if kept is None else kept.gather(1, chosen)


@register("rows(Tensor table, Tensor kept, int dim, int ndim, int[] removed) -> Tensor")
def rows(table: Tensor, kept: Tensor, dim: int, ndim: int, removed: list[int]) -> Tensor:
    """The rows of a table for the tokens there are now.

    Args:
        table: broadcast against values of ``ndim`` dimensions, original tokens on ``dim``.
        kept: ``[B, N']``, original positions.
        dim: where the tokens stand in such a value, 1 or more.
        ndim: its number of dimensions.
        removed: original positions the table has no row for.

    Returns:
        the table with N' rows on ``dim``, batch first.
    """
    table = table.reshape([1] * (ndim - table.ndim) + list(table.shape))
    own = table.expand(kept.shape[0], *table.shape[1:])  # a table for each image
    return gather(own, without(kept, removed), dim)


@register("merge_rows(Tensor table, Tensor source, SymInt tokens) -> Tensor")
def merge_rows(table: Tensor, source: Tensor, tokens: int) -> Tensor:
    """The mean of a table's rows over the original tokens that each token holds.

    Args:
        table: ``[N, C]`` or ``[1 or B, N, C]``.
        source: ``[B, N]``, the token that holds each original one.
        tokens: N' there are now.

    Returns:
        ``[B, N', C]`` in the dtype of ``table``; of equal rows what they are, to the bit.
    """
    wide = table.expand(source.shape[0], *table.shape[-2:])
    merged: Tensor = merge(wide, None, source, tokens)
    return merged


@register("merge_bias(Tensor bias, Tensor source, SymInt tokens) -> Tensor")
def merge_bias(bias: Tensor, source: Tensor, tokens: int) -> Tensor:
    """A position bias among original tokens, for the tokens there are now.

    Over merged columns the log-mean-exp, which with log(size) added is exactly what their keys
    would have weighed apart; over merged rows the mean.

    Args:
        bias: ``[..., N, N]``, at most four dimensions; an axis of length 1 is left alone.
        source: ``[B, N]``, the token that holds each original one.
        tokens: N' there are now.

    Returns:
        ``[B, H or 1, N', N']`` in the dtype of ``bias``; 0 to and from a token that holds none.
        Of equal biases what they are, to the bit.

    Raises:
        ValueError: if there is not one index a token, for every image of the bias.
    """
    check_map(source, name="source")
    batch, before = source.shape
    lengths = [1] * (4 - bias.ndim) + list(bias.shape)
    wrong = any(length not in (1, before) for length in lengths[2:])
    if len(lengths) != 4 or wrong or lengths[0] not in (1, batch):
        wanted = f"[{batch}, H, {before}, {before}]"
        raise ValueError(f"expected a bias that broadcasts to {wanted}, got {list(bias.shape)}")
    if tokens < 1:
        raise ValueError(f"expected tokens to be left, got {tokens}")
    with without_autocast(bias.device):
        wide = bias.to(at_least_float32(bias.dtype))
        wide = wide.reshape(lengths)
        held = sent(source, tokens).to(wide.dtype)
        weight = (held / held.sum(-1, keepdim=True).clamp(min=1)).unsqueeze(1)
        stands = standing(held)
        # What each token is held against: one of those that it is merged with.
        near = stands.gather(1, source.clamp(0, tokens - 1)).clamp(min=0)
        places = stands, near
        if wide.shape[-1] > 1:
            wide = _merged_columns(wide, weight, *places)
        if wide.shape[-2] > 1:
            wide = _merged_rows(wide, weight, *places)
        return wide.to(bias.dtype)


def _merged_columns(bias: Tensor, weight: Tensor, stands: Tensor, near: Tensor) -> Tensor:
    """The log-mean-exp over the columns of each index; of equal ones what they are, to the bit."""
    nothing = (stands < 0)[:, None, None]
    stands = stands.clamp(min=0)
    # The largest of a row stays out of the exponential, or it could overflow.
    largest = bias.detach().amax(-1, keepdim=True)
    shares = (bias - largest).exp()
    images = near.shape[0], -1, -1, -1
    with torch.no_grad():
        one = gather(shares.expand(images), stands, 3)
        others = gather(shares.expand(images), near, 3)
    mean = one - (others - shares) @ weight.transpose(-1, -2)
    # The logarithm of nothing would spread to all rows, and its gradient to all biases.
    blank = nothing | (mean == 0)
    merged = torch.where(blank, 1.0, mean).log() + largest
    with torch.no_grad():
        value = torch.where(mean == one, gather(bias.expand(images), stands, 3), merged)
    return torch.where(nothing, 0.0, value + (merged - merged.detach()))


def _merged_rows(bias: Tensor, weight: Tensor, stands: Tensor, near: Tensor) -> Tensor:
    """The mean over the rows of each index; of equal ones what they are, to the bit."""
    bias = bias.expand(near.shape[0], -1, -1, -1)
    with torch.no_grad():
        one = gather(bias, stands.clamp(min=0), 2)
        one = torch.where((stands >= 0)[:, None, :, None], one, 0.0)
        others = gather(bias, near, 2)
    return one - weight @ (others - bias)
