"""``tome::match_triton``, ``merge_triton`` and kin: kernels for CUDA, with gradients.

They mean what the composite operators of :mod:`tomepass.ops` mean, which stay the reference, the
fallback and what is exported. Triton is imported by the first call. Without a GPU it can interpret
them (``TRITON_INTERPRET=1``), slowly: that is how they are tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tomepass.errors import TomeError
from tomepass.kernels.tuning import Configuration, run_fastest
from tomepass.ops.library import at_least_float32, register_differentiable
from tomepass.ops.match import check_r, free_positions
from tomepass.ops.padding import PADDED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What graphs take the kernels for."""
MOST_TOKENS = 8192
MOST_HEADS, MOST_WIDTH = 64, 256
MOST_CHANNELS = 8192
MOST_STRETCHES = 8
"""Protected positions in a row are one stretch."""

# Up to so many numbers of even tokens one program makes the match of an image.
_ONE_PROGRAM = 128 * 64


# ---- match ---------------------------------------------------------------------------------


def _match_result(keys: Tensor, r: int, protected: list[int], size: Tensor | None = None) -> Tensor:
    return keys.new_empty((keys.shape[0], keys.shape[2]), dtype=torch.int64)


@register_differentiable(
    "match_triton(Tensor keys, SymInt r, int[] protected, Tensor? size=None) -> Tensor",
    _match_result,
)
def match_triton(keys: Tensor, r: int, protected: list[int], size: Tensor | None = None) -> Tensor:
    """``tome::match``: see there. Equal maps for float32 keys; others are multiplied in three
    products of TensorFloat-32, which is next to float32.

    Raises:
        ValueError: if ``r`` is more than can merge.
        TomeError: on a CPU, unless Triton interprets.
    """
    tokens = keys.shape[2]
    even, _, held = free_positions(tokens, protected)
    check_r(r, tokens, held)
    if r == 0:
        return torch.arange(tokens, device=keys.device).repeat(keys.shape[0], 1)
    _need_triton(keys)
    assign = _match_result(keys, r, protected, size)
    sequence = {"tokens": tokens, "r": r, "first_odd": len(held) + len(even) - r}
    padded = 0.0 if size is None else PADDED
    size = None if size is None else size.contiguous()
    block = max(_power(-(-tokens // 2)), 16)
    if block <= 128 and block * _power(keys.shape[3]) <= _ONE_PROGRAM:
        _match_image(keys, size, assign, tuple(held), padded, sequence, block)
    else:
        _match_in_three(keys, size, assign, tuple(held), padded, sequence, block)
    return assign


def _match_image(
    keys: Tensor,
    size: Tensor | None,
    assign: Tensor,
    held: tuple[int, ...],
    padded: float,
    sequence: dict[str, int],
    block: int,
) -> None:
    from tomepass.kernels.triton_match import match_image

    def run(configuration: Configuration) -> None:
        match_image[(keys.shape[0],)](
            *(keys, size, assign, *keys.stride()),
            **sequence,
            nearest_odd=_nearest_odd(sequence["tokens"], held),
            **_metric_options(keys),
            **_score_options(keys, held, padded),
            BLOCK_EVEN=block,
            BLOCK_ODD=min(configuration.across, block),
            **configuration.launch,
        )

    # Each takes seconds to compile, its loads of all heads written out.
    configurations = [Configuration(block, 64, 8), Configuration(block, 32, 4)]
    kind = ("match_image", block, keys.dtype, *keys.shape[1::2], size is None)
    run_fastest(kind, configurations, run, keys.device)


def _match_in_three(
    keys: Tensor,
    size: Tensor | None,
    assign: Tensor,
    held: tuple[int, ...],
    padded: float,
    sequence: dict[str, int],
    block: int,
) -> None:
    from tomepass.kernels.triton_match import edges_kernel, map_kernel, metric_kernel

    batch, _, tokens, width = keys.shape
    edges = -(-tokens // 2)
    metric = keys.new_empty((batch, tokens, width), dtype=torch.float32)
    best = keys.new_empty((batch, edges), dtype=torch.float32)
    partner = keys.new_empty((batch, edges), dtype=torch.int32)

    def run_metric(configuration: Configuration) -> None:
        metric_kernel[(batch * -(-tokens // configuration.block),)](
            *(keys, metric, *keys.stride(), tokens),
            **_metric_options(keys),
            BLOCK=configuration.block,
            **configuration.launch,
        )

    def run_edges(configuration: Configuration) -> None:
        edges_kernel[(batch * -(-edges // configuration.block),)](
            *(metric, size, best, partner, tokens, _nearest_odd(tokens, held), width),
            **_score_options(keys, held, padded),
            BLOCK_D=max(_power(width), 16),
            BLOCK_EVEN=configuration.block,
            BLOCK_ODD=configuration.across,
            STAGES=configuration.stages,
            num_warps=configuration.warps,
        )

    kind = (block, keys.dtype, *keys.shape[1::2], size is None)
    blocks = [Configuration(rows, 0, 4) for rows in (32, 16, 64)]
    run_fastest(("metric", *kind), blocks, run_metric, keys.device)
    run_fastest(("edges", *kind), edge_configurations(width), run_edges, keys.device)
    with _on(keys):
        map_kernel[(batch,)](
            *(best, partner, assign), **sequence, HELD=_stretches(held), BLOCK=block, num_warps=8
        )


def edge_configurations(width: int) -> list[Configuration]:
    """Tiles of even and odd tokens: the smallest must fit the shared memory of the device."""
    small = Configuration(64, 16, 4)
    if width > 128:
        return [Configuration(64, 32, 4), small]
    return [
        Configuration(64, 64, 4),
        Configuration(64, 64, 4, stages=2),
        Configuration(64, 32, 4, stages=3),
        Configuration(128, 64, 8),
        small,
    ]


def unfit(keys: tuple[int, ...], dtype: torch.dtype, protected: Sequence[int], memory: int) -> str:
    """Why no configuration fits a match; empty if one does.

    Args:
        keys: ``[B, H, N, D]``.
        dtype: of the keys.
        protected: positions that do not take part.
        memory: bytes that one program may share on the device.
    """
    _, heads, tokens, width = keys
    if dtype not in DTYPES:
        return f"{dtype} keys, there are kernels for {', '.join(map(str, DTYPES))}"
    for what, count, most in (
        ("tokens", tokens, MOST_TOKENS),
        ("heads", heads, MOST_HEADS),
        ("channels a head", width, MOST_WIDTH),
        ("stretches of protected tokens", _count_stretches(protected), MOST_STRETCHES),
    ):
        if count > most:
            return f"{count} {what}, a kernel takes {most}"
    smallest = edge_configurations(width)[-1]
    # Products in three hold what they multiply twice.
    needed = 2 * 4 * (smallest.block + smallest.across) * max(_power(width), 16)
    if needed > memory:
        return f"{width} channels a head need {needed} bytes of shared memory, there are {memory}"
    return ""


def _metric_options(keys: Tensor) -> dict[str, int]:
    heads, width = keys.shape[1], keys.shape[3]
    return {"HEADS": heads, "WIDTH": width, "BLOCK_D": max(_power(width), 16)}


def _score_options(keys: Tensor, held: tuple[int, ...], padded: float) -> dict[str, Any]:
    # AMD's compiler knows no products of TensorFloat-32 in three.
    exact = keys.dtype is torch.float32 or torch.version.hip is not None
    return {
        "HELD": _stretches(held),
        "PADDED": padded,
        "PRECISION": "ieee" if exact else "tf32x3",
    }


@lru_cache
def _stretches(held: tuple[int, ...]) -> tuple[int, ...]:
    """Ascending positions as ``(start, stop, start, stop, ...)``."""
    found: list[int] = []
    for position in held:
        if found and found[-1] == position:
            found[-1] += 1
        else:
            found += [position, position + 1]
    return tuple(found)


@lru_cache
def _nearest_odd(tokens: int, held: tuple[int, ...]) -> int:
    """Where a token goes that is like no other: the first that may be merged into."""
    return free_positions(tokens, held)[1][0]


# ---- what is sent where --------------------------------------------------------------------


def _sources_result(assign: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    return (
        assign.new_empty(assign.shape, dtype=torch.int32),
        assign.new_empty((assign.shape[0], tokens + 1), dtype=torch.int32),
    )


@register_differentiable(
    "sources_triton(Tensor assign, SymInt tokens) -> (Tensor, Tensor)", _sources_result
)
def sources_triton(assign: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """An index map the other way round, for sums in a fixed order.

    Args:
        assign: ``[B, N]`` int64 below ``tokens``.
        tokens: N', places there are.

    Returns:
        ``[B, N]`` int32, the tokens by the place they are sent to, then by position; and
        ``[B, N' + 1]`` int32, where each place's begin.
    """
    from tomepass.kernels.triton_merge import sources_kernel

    _need_triton(assign)
    order, start = _sources_result(assign, tokens)
    assign = assign.contiguous()
    batch, before = assign.shape
    most = max(before, tokens + 1)

    def run(configuration: Configuration) -> None:
        sources_kernel[(batch * -(-most // configuration.block),)](
            *(assign, order, start, before, tokens),
            BLOCK=configuration.block,
            CHUNK=configuration.across,
            **configuration.launch,
        )

    blocks = [Configuration(rows, across) for rows, across in ((32, 64), (64, 64), (32, 128))]
    run_fastest(("sources", _power(most)), blocks, run, assign.device)
    return order, start


# ---- merge ---------------------------------------------------------------------------------


def _merge_result(
    x: Tensor,
    added: Tensor | None,
    size: Tensor | None,
    assign: Tensor,
    order: Tensor,
    start: Tensor,
) -> tuple[Tensor, Tensor]:
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
        order: as :func:`sources_triton` answers it for ``assign``.
        start: likewise.

    Raises:
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
    through, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed, merged, [merged.shape[2]], mean, deviation, weight, bias, [True, True, True]
    )
    made = _sent_back(grad + through, size, assign, total)
    added = made if ctx.added else None
    return made, added, None, None, None, None, grad_weight, grad_bias, None


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
        TomeError: on a CPU, unless Triton interprets.
    """
    made = _merge_norm_result(x, added, size, assign, order, start, weight, bias, eps)
    norm = (weight.contiguous(), bias.contiguous(), eps, *made[2:])
    _sum_up(x, added, size, order, start, made[0], made[1], norm)
    return made


def _sum_result(
    x: Tensor, weight: Tensor | None, assign: Tensor, order: Tensor, start: Tensor
) -> Tensor:
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
    from tomepass.kernels.triton_merge import merge_kernel

    _need_triton(x)
    x, added = _rows(x), None if added is None else _rows(added)
    size = None if size is None else size.contiguous()
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
            WIDE=_wide(made.dtype),
            BLOCK_C=_power(width),
            ROWS=configuration.block,
            **configuration.launch,
        )

    kind = ("merge", _power(left), width, x.dtype, added is None, total is None, norm is None)
    run_fastest(kind, row_configurations(width, norm=norm is not None), run, x.device)


def row_configurations(width: int, *, norm: bool = False) -> list[Configuration]:
    """Rows a program makes, such that its threads load 16 bytes at a time.

    A sum over channels goes through the same threads in the same order however many rows there
    are, but not however many warps: where there is one, these are four.
    """
    few = max(2048 // _power(width), 1)
    found = [Configuration(rows) for rows in (2 * few, few, 4 * few)]
    return found if norm else [*found, Configuration(4 * few, warps=8)]


# ---- unmerge -------------------------------------------------------------------------------


def _unmerge_result(x: Tensor, source: Tensor, weight: Tensor | None = None) -> Tensor:
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
        weight: ``[B, N]`` float32, multiplies the tokens of the result; None for ones.

    Raises:
        TomeError: on a CPU, unless Triton interprets.
    """
    from tomepass.kernels.triton_merge import gather_kernel

    _need_triton(x)
    made = _unmerge_result(x, source, weight)
    x, source = _rows(x), source.contiguous()
    weight = None if weight is None else weight.contiguous()
    batch, tokens, width = made.shape

    def run(configuration: Configuration) -> None:
        gather_kernel[(batch * -(-tokens // configuration.block),)](
            *(x, source, weight, made, tokens, width, *x.stride()[:2]),
            WEIGHTED=weight is not None,
            WIDE=_wide(x.dtype),
            BLOCK_C=_power(width),
            ROWS=configuration.block,
            **configuration.launch,
        )

    kind = ("gather", _power(tokens), width, x.dtype, weight is None)
    run_fastest(kind, row_configurations(width), run, x.device)
    return made


# ---- details -------------------------------------------------------------------------------


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << max(number - 1, 0).bit_length()


def _rows(x: Tensor) -> Tensor:
    """With channels side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


def _wide(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.float64 if dtype is torch.float64 else tl.float32


def _on(x: Tensor) -> Any:
    from contextlib import nullcontext

    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def interpreted() -> bool:
    """Does Triton run its kernels in Python?"""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _need_triton(x: Tensor) -> None:
    if x.device.type == "cpu" and not interpreted():
        raise TomeError(
            "Triton's kernels run on CUDA devices, this tensor is on the CPU",
            advice="set TRITON_INTERPRET=1 before Triton is imported to run them in its "
            "interpreter, or call the composite operator of the same meaning",
        )


def _count_stretches(protected: Sequence[int]) -> int:
    return len(_stretches(tuple(sorted(set(protected))))) // 2
