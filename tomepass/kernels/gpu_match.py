"""``tome::match_triton``: the index map of a match, by Triton on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tomepass.kernels.gpu import DTYPES, need_triton, on_device, power
from tomepass.kernels.tuning import Configuration, run_fastest
from tomepass.ops.library import register_differentiable
from tomepass.ops.match import check_r, free_positions
from tomepass.ops.padding import PADDED

MOST_TOKENS = 8192
MOST_HEADS, MOST_WIDTH = 64, 256
MOST_STRETCHES = 8
"""Protected positions in a row are one stretch."""

# Up to so many numbers of even tokens one program makes the match of an image.
_ONE_PROGRAM = 128 * 64


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
    need_triton(keys)
    assign = _match_result(keys, r, protected, size)
    sequence = {"tokens": tokens, "r": r, "first_odd": len(held) + len(even) - r}
    padded = 0.0 if size is None else PADDED
    size = None if size is None else size.contiguous()
    block = max(power(-(-tokens // 2)), 16)
    if block <= 128 and block * power(keys.shape[3]) <= _ONE_PROGRAM:
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
            BLOCK_D=max(power(width), 16),
            BLOCK_EVEN=configuration.block,
            BLOCK_ODD=configuration.across,
            STAGES=configuration.stages,
            num_warps=configuration.warps,
        )

    kind = (block, keys.dtype, *keys.shape[1::2], size is None)
    blocks = [Configuration(rows, 0, 4) for rows in (32, 16, 64)]
    run_fastest(("metric", *kind), blocks, run_metric, keys.device)
    run_fastest(("edges", *kind), edge_configurations(width), run_edges, keys.device)
    with on_device(keys):
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
    needed = 2 * 4 * (smallest.block + smallest.across) * max(power(width), 16)
    if needed > memory:
        return f"{width} channels a head need {needed} bytes of shared memory, there are {memory}"
    return ""


def _metric_options(keys: Tensor) -> dict[str, int]:
    heads, width = keys.shape[1], keys.shape[3]
    return {"HEADS": heads, "WIDTH": width, "BLOCK_D": max(power(width), 16)}


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


def _count_stretches(protected: Sequence[int]) -> int:
    return len(_stretches(tuple(sorted(set(protected))))) // 2
