"""``tome::merge_triton`` and kin: merging and its way back, by Triton on CUDA, with gradients.

A gradient is made of operators that have gradients themselves: merging's is a gather with weights,
unmerging's a sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tomepass.kernels.given import (
    Operand,
    check_left,
    check_operands,
    lengths_of,
    size_operand,
    sizes_of,
)
from tomepass.kernels.gpu.device import DTYPES, need_triton, power, wide, with_rows
from tomepass.kernels.gpu.sources import INDEX, PLACE, sources_triton
from tomepass.kernels.gpu.tuning import Configuration, run_fastest
from tomepass.ops.arguments import each_image
from tomepass.ops.library import at_least_float32, register_differentiable

MOST_CHANNELS = 8192

_WIDE = (*DTYPES, torch.float64)


def check_merge(x: Tensor, size: Tensor | None, assign: Tensor, tokens: int) -> None:
    """Raises ValueError if ``merge_triton`` does not take what ``tome::merge`` is given."""
    batch, before, _ = lengths_of("merge_triton", "x", x, 3, _WIDE)
    index = Operand("assign", assign, (batch, before), INDEX)
    check_operands("merge_triton", x, size_operand(size, batch, before), index)
    check_left("merge_triton", tokens)


def check_unmerge(x: Tensor, source: Tensor, dim: int) -> None:
    """Raises ValueError if ``unmerge_triton`` does not take what ``tome::unmerge`` is given."""
    batch, *_ = lengths_of("unmerge_triton", "x", x, 3, _WIDE)
    index = Operand("source", source, (batch, None), INDEX)
    check_operands("unmerge_triton", x, index)


def _check_sums(
    kernel: str,
    x: Tensor,
    added: Tensor | None,
    size: Tensor | None,
    assign: Tensor,
    order: Tensor,
    start: Tensor,
) -> None:
    """Raises ValueError if :func:`_sum_up` does not take these."""
    batch, before, width = lengths_of(kernel, "x", x, 3, _WIDE)
    if width > MOST_CHANNELS:
        raise ValueError(f"tome::{kernel}: expected at most {MOST_CHANNELS} channels, got {width}")
    check_operands(
        kernel,
        x,
        Operand("added", added, (batch, before, width), _WIDE, optional=True),
        size_operand(size, batch, before),
        Operand("assign", assign, (batch, before), INDEX),
        Operand("order", order, (batch, before), PLACE),
        Operand("start", start, (batch, None), PLACE),
    )
    check_left(kernel, start.shape[1] - 1)


def _merge_result(
    x: Tensor,
    added: Tensor | None,
    size: Tensor | None,
    assign: Tensor,
    order: Tensor,
    start: Tensor,
) -> tuple[Tensor, Tensor]:
    _check_sums("merge_triton", x, added, size, assign, order, start)
    dtype = x.dtype if added is None else torch.promote_types(x.dtype, added.dtype)
    shape = (x.shape[0], start.shape[1] - 1)
    return (
        x.new_empty((*shape, x.shape[2]), dtype=dtype),
        x.new_empty(shape, dtype=torch.float32),
    )


def _merge_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, added, size, assign, *_ = inputs
    ctx.added = added is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(size, assign, output[1])


def _merge_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    made = _sent_back(grad, *ctx.saved_tensors)
    return made, made if ctx.added else None, None, None, None, None


def _sent_back(grad: Tensor, size: Tensor | None, assign: Tensor, total: Tensor) -> Tensor:
    """A gradient to what was merged: each token's is its share of its place's."""
    total = total.clamp(min=torch.finfo(torch.float32).tiny)
    share = total.reciprocal() if size is None else total
    share = share.gather(1, assign)
    back: Tensor = unmerge_triton(grad, assign, share if size is None else size / share)
    return back


@register_differentiable(
    "merge_triton(Tensor x, Tensor? added, Tensor? size, Tensor assign, Tensor order, Tensor start)"
    " -> (Tensor, Tensor)",
    _merge_result,
    _merge_backward,
    _merge_context,
)
def merge_triton(
    x: Tensor,
    added: Tensor | None,
    size: Tensor | None,
    assign: Tensor,
    order: Tensor,
    start: Tensor,
) -> tuple[Tensor, Tensor]:
    """``tome::merge`` of ``x`` or ``x + added``, and ``tome::merge_size``: see there.

    Summed in float32 and rounded once. A token that nothing merges with is copied bit by bit.

    Args:
        order: as :func:`sources_triton` answers it for ``assign``. What another says is summed up
            as it says, of the image's own tokens.
        start: likewise.

    Raises:
        ValueError: if an operand is another than expected.
        TomeError: on a CPU, unless Triton interprets.
    """
    merged, total = _merge_result(x, added, size, assign, order, start)
    _sum_up(x, added, size, order, start, merged, total)
    return merged, total


def _merge_norm_result(
    x: Tensor,
    added: Tensor | None,
    size: Tensor | None,
    assign: Tensor,
    order: Tensor,
    start: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    merged, total = _merge_result(x, added, size, assign, order, start)
    # What is summed in float32 makes no float64 of it.
    dtypes = _WIDE if merged.dtype is torch.float64 else DTYPES
    lengths = (x.shape[2],)
    affine = Operand("weight", weight, lengths, dtypes), Operand("bias", bias, lengths, dtypes)
    check_operands("merge_norm_triton", x, *affine)
    moment = total.new_empty((*total.shape, 1), dtype=at_least_float32(merged.dtype))
    normed = torch.empty_like(merged, dtype=torch.promote_types(merged.dtype, weight.dtype))
    return merged, total, normed, moment, torch.empty_like(moment)


def _merge_norm_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, added, size, assign, _, _, weight, bias, _ = inputs
    merged, total, _, mean, deviation = output
    ctx.added = added is not None
    ctx.mark_non_differentiable(total, mean, deviation)
    ctx.save_for_backward(size, assign, total, merged, mean, deviation, weight, bias)


def _merge_norm_backward(
    ctx: Any, grad: Tensor, _: Any, grad_normed: Tensor, *__: Any
) -> tuple[Tensor | None, ...]:
    size, assign, total, merged, mean, deviation, weight, bias = ctx.saved_tensors
    # Weights may be wider than tokens, and narrower, under autocast.
    dtype = grad_normed.dtype
    merged, gain, shift = merged.to(dtype), weight.to(dtype), bias.to(dtype)
    through, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed, merged, [merged.shape[2]], mean, deviation, gain, shift, [True, True, True]
    )
    made = _sent_back(grad + through, size, assign, total)
    added = made if ctx.added else None
    return (
        made,
        added,
        None,
        None,
        None,
        None,
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
        None,
    )


@register_differentiable(
    "merge_norm_triton(Tensor x, Tensor? added, Tensor? size, Tensor assign, Tensor order,"
    " Tensor start, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _merge_norm_result,
    _merge_norm_backward,
    _merge_norm_context,
)
def merge_norm_triton(
    x: Tensor,
    added: Tensor | None,
    size: Tensor | None,
    assign: Tensor,
    order: Tensor,
    start: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """:func:`merge_triton` and the LayerNorm after it, in one pass.

    Args:
        weight: ``[C]``, of the LayerNorm.
        bias: ``[C]``.
        eps: added to the variance.

    Returns:
        merged tokens ``[B, N', C]``, sizes ``[B, N']``, normalised tokens ``[B, N', C]``, and for
        gradients their means and reciprocal deviations, ``[B, N', 1]``.

    Raises:
        ValueError: if an operand is another than expected.
        TomeError: on a CPU, unless Triton interprets.
    """
    made = _merge_norm_result(x, added, size, assign, order, start, weight, bias, eps)
    norm = (weight.contiguous(), bias.contiguous(), eps, *made[2:])
    _sum_up(x, added, size, order, start, made[0], made[1], norm)
    return made


def _sum_result(
    x: Tensor, weight: Tensor | None, assign: Tensor, order: Tensor, start: Tensor
) -> Tensor:
    _check_sums("sum_triton", x, None, weight, assign, order, start)
    return x.new_empty((x.shape[0], start.shape[1] - 1, x.shape[2]))


def _weighted_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, weight, assign, *_ = inputs
    ctx.save_for_backward(weight, assign)


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, assign = ctx.saved_tensors
    return unmerge_triton(grad, assign, weight), None, None, None, None


@register_differentiable(
    "sum_triton(Tensor x, Tensor? weight, Tensor assign, Tensor order, Tensor start) -> Tensor",
    _sum_result,
    _sum_backward,
    _weighted_context,
)
def sum_triton(
    x: Tensor, weight: Tensor | None, assign: Tensor, order: Tensor, start: Tensor
) -> Tensor:
    """The weighted sum of the tokens sent to each place: ``[B, N, C]`` to ``[B, N', C]``.

    The gradient of :func:`unmerge_triton`; its arguments are those of :func:`merge_triton`.
    """
    made = _sum_result(x, weight, assign, order, start)
    _sum_up(x, None, weight, order, start, made, None)
    return made


def _sum_up(
    x: Tensor,
    added: Tensor | None,
    size: Tensor | None,
    order: Tensor,
    start: Tensor,
    made: Tensor,
    total: Tensor | None,
    norm: tuple[Any, ...] | None = None,
) -> None:
    """Launches the merge kernel: a mean where ``total`` is asked for, else a sum."""
    from tomepass.kernels.gpu.triton_merge import merge_kernel

    need_triton(x)
    x, added = with_rows(x), None if added is None else with_rows(added)
    order, start = order.contiguous(), start.contiguous()
    size = sizes_of(size, *x.shape[:2])
    weight, bias, eps, *outputs = norm or (None, None, 0.0, None, None, None)
    batch, before, width = x.shape
    left = made.shape[1]

    def run(configuration: Configuration) -> None:
        merge_kernel[(batch * -(-left // configuration.block),)](
            *(x, added, size, order, start, weight, bias, made, total, *outputs),
            *(before, left, width, eps, *x.stride()[:2]),
            *((x if added is None else added).stride()[:2]),
            ADDED=added is not None,
            SIZED=size is not None,
            MEAN=total is not None,
            NORM=norm is not None,
            WIDE=wide(made.dtype),
            BLOCK_C=power(width),
            ROWS=configuration.block,
            **configuration.launch,
        )

    kind = ("merge", power(left), width, x.dtype, added is None, total is None, norm is None)
    run_fastest(kind, row_configurations(width, norm=norm is not None), run, x.device)


def row_configurations(width: int, *, norm: bool = False) -> list[Configuration]:
    """Rows a program makes, such that its threads load 16 bytes at a time.

    A sum over channels goes through the same threads in the same order however many rows there
    are, but not however many warps: where there is one, these are four.
    """
    few = max(2048 // power(width), 1)
    found = [Configuration(rows) for rows in (2 * few, few, 4 * few)]
    return found if norm else [*found, Configuration(4 * few, warps=8)]


def _unmerge_result(x: Tensor, source: Tensor, weight: Tensor | None = None) -> Tensor:
    check_unmerge(x, source, 1)
    name, (batch, _, width) = "unmerge_triton", x.shape
    check_operands(name, x, size_operand(weight, batch, source.shape[1], "weight"))
    if width > MOST_CHANNELS:
        raise ValueError(f"tome::{name}: expected at most {MOST_CHANNELS} channels, got {width}")
    return x.new_empty((x.shape[0], source.shape[1], x.shape[2]))


def _unmerge_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, source, weight = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(weight, source)


def _unmerge_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, source = ctx.saved_tensors
    order, start = sources_triton(source, ctx.tokens)
    return sum_triton(grad, weight, source, order, start), None, None


@register_differentiable(
    "unmerge_triton(Tensor x, Tensor source, Tensor? weight=None) -> Tensor",
    _unmerge_result,
    _unmerge_backward,
    _unmerge_context,
)
def unmerge_triton(x: Tensor, source: Tensor, weight: Tensor | None = None) -> Tensor:
    """``tome::unmerge`` of ``[B, N', C]`` on its second dimension: see there.

    Args:
        source: ``[B, N]`` int64; where it is no index of ``x`` the result is not a number.
        weight: ``[B, N]``, multiplies the tokens of the result; None for ones.

    Raises:
        ValueError: if an operand is another than expected.
        TomeError: on a CPU, unless Triton interprets.
    """
    from tomepass.kernels.gpu.triton_merge import gather_kernel

    made = _unmerge_result(x, source, weight)
    need_triton(x)
    x, source = with_rows(x), source.contiguous()
    batch, tokens, width = made.shape
    weight = None if weight is None else each_image(weight, batch, tokens).contiguous()

    def run(configuration: Configuration) -> None:
        gather_kernel[(batch * -(-tokens // configuration.block),)](
            *(x, source, weight, made, tokens, x.shape[1], width, *x.stride()[:2]),
            WEIGHTED=weight is not None,
            WIDE=wide(x.dtype),
            BLOCK_C=power(width),
            ROWS=configuration.block,
            **configuration.launch,
        )

    kind = ("gather", power(tokens), width, x.dtype, weight is None)
    run_fastest(kind, row_configurations(width), run, x.device)
    return made
