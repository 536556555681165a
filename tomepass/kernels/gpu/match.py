"""``tome::match_triton``: the index map of a match, by Triton on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tomepass.kernels.given import check_operands, lengths_of, size_operand, sizes_of
from tomepass.kernels.gpu.device import DTYPES, need_triton, on_device, power, shared_memory
from tomepass.kernels.gpu.tuning import Configuration, run_fastest
from tomepass.ops.library import register_differentiable
from tomepass.ops.matching.match import check_r, free_positions
from tomepass.ops.padding import PADDED

MOST_TOKENS = 8192

MOST_HEADS, MOST_WIDTH = 64, 256

MOST_STRETCHES = 8
"""Protected positions in a row are one stretch."""


# Up to so many numbers of even tokens one program makes the match of an image.
_ONE_PROGRAM = 128 * 64


def check_match(keys: Tensor, r: int, protected: list[int], size: Tensor | None = None) -> None:
    """Raises ValueError if ``match_triton`` does not take these, but for how large they are."""
    name = "match_triton"
    batch, heads, tokens, _ = lengths_of(name, "keys", keys, 4, DTYPES)
    if heads == 0:
        raise ValueError(f"tome::{name}: expected keys of some heads, got {list(keys.shape)}")
    check_operands(name, keys, size_operand(size, batch, tokens))
    check_r(r, tokens, protected)


def _match_result(keys: Tensor, r: int, protected: list[int], size: Tensor | None = None) -> Tensor:
    check_match(keys, r, protected, size)
    return keys.new_empty((keys.shape[0], keys.shape[2]), dtype=torch.int64)


@register_differentiable(
    "match_triton(Tensor keys, SymInt r, int[] protected, Tensor? size=None) -> Tensor",
    _match_result,
)
def match_triton(keys: Tensor, r: int, protected: list[int], size: Tensor | None = None) -> Tensor:
    """``tome::match``: see there. Equal maps for float32 keys; others are multiplied in three
    products of TensorFloat-32, which is next to float32.

    Raises:
        ValueError: if ``r`` is more than can merge, an operand is another than expected, or no
            configuration fits it.
        TomeError: on a CPU, unless Triton interprets.
    """
    assign = _match_result(keys, r, protected, size)
    batch, _, tokens, width = keys.shape
    held, first_odd, nearest_odd = _positions(tokens, r, tuple(protected))
    if r == 0:
        return torch.arange(tokens, device=keys.device).repeat(batch, 1)
    need_triton(keys)
    memory = shared_memory(keys.device)
    if reason := unfit(tuple(keys.shape), keys.dtype, protected, memory):
        raise ValueError(f"tome::match_triton: no configuration fits {reason}")
    sequence = {"tokens": tokens, "r": r, "first_odd": first_odd}
    scored = {
        "nearest_odd": nearest_odd,
        "HELD": held,
        "PADDED": 0.0 if size is None else PADDED,
        # AMD's compiler knows no products of TensorFloat-32 in three.
        "PRECISION": "ieee" if keys.dtype is torch.float32 or torch.version.hip else "tf32x3",
    }
    size = sizes_of(size, batch, tokens)
    block = _even_block(tokens)
    if in_one_program(tokens, width, memory):
        _match_image(keys, size, assign, sequence, scored, block)
    else:
        _match_in_three(keys, size, assign, sequence, scored, block)
    return assign


def _match_image(
    keys: Tensor,
    size: Tensor | None,
    assign: Tensor,
    sequence: dict[str, int],
    scored: dict[str, Any],
    block: int,
) -> None:
    from tomepass.kernels.gpu.triton_match import match_image

    def run(configuration: Configuration) -> None:
        match_image[(keys.shape[0],)](
            *(keys, size, assign, *keys.stride()),
            **sequence,
            **scored,
            **_metric_options(keys),
            BLOCK_EVEN=block,
            BLOCK_ODD=configuration.across,
            **configuration.launch,
        )

    kind = ("match_image", block, keys.dtype, *keys.shape[1::2], size is None)
    run_fastest(kind, image_configurations(block, keys.shape[3]), run, keys.device)


def _match_in_three(
    keys: Tensor,
    size: Tensor | None,
    assign: Tensor,
    sequence: dict[str, int],
    scored: dict[str, Any],
    block: int,
) -> None:
    from tomepass.kernels.gpu.triton_match import edges_kernel, map_kernel, metric_kernel

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
            *(metric, size, best, partner, tokens),
            **scored,
            WIDTH=width,
            BLOCK_D=max(power(width), 16),
            BLOCK_EVEN=configuration.block,
            BLOCK_ODD=configuration.across,
            STAGES=configuration.stages,
            **configuration.launch,
        )

    kind = (block, keys.dtype, *keys.shape[1::2], size is None)
    run_fastest(("metric", *kind), metric_configurations(width), run_metric, keys.device)
    run_fastest(("edges", *kind), edge_configurations(width), run_edges, keys.device)
    with on_device(keys):
        map_kernel[(batch,)](
            *(best, partner, assign),
            **sequence,
            HELD=scored["HELD"],
            BLOCK=block,
            **Configuration(block, warps=8).launch,
        )


# The length of a metric is a sum over channels in the order in which threads hold them: 16 bytes
# each, or fewer where a tile has too few numbers. So many a thread leave the order as it is.
_LOADED = 8


def image_configurations(block: int, width: int) -> list[Configuration]:
    """Odd tokens at a time. Each takes seconds to compile, its loads of all heads written out."""
    many, few = (Configuration(block, min(odd, block), warps) for odd, warps in ((64, 8), (32, 4)))
    full = many.across * max(power(width), 16) >= 32 * many.warps * _LOADED
    return [many, few] if full else [few]


def metric_configurations(width: int) -> list[Configuration]:
    """Tokens a program, no fewer than fill its threads."""
    fewest = 32 * 4 * _LOADED // max(power(width), 16)
    return [Configuration(rows) for rows in (32, 16, 64) if rows >= fewest]


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


def in_one_program(tokens: int, width: int, memory: int) -> bool:
    """Does one program make the match of an image, in the shared memory there is?"""
    block = _even_block(tokens)
    if block > 128 or block * power(width) > _ONE_PROGRAM:
        return False
    return shared_bytes(image_configurations(block, width)[-1], width) <= memory


def shared_bytes(configuration: Configuration, width: int) -> int:
    """What a program shares of which this is the configuration: what it multiplies, and as
    products in three hold it twice."""
    return 2 * 4 * (configuration.block + configuration.across) * max(power(width), 16)


def _even_block(tokens: int) -> int:
    """Even tokens, as many as a program makes at once."""
    return max(power(-(-tokens // 2)), 16)


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
    needed = shared_bytes(edge_configurations(width)[-1], width)
    if needed > memory and not in_one_program(tokens, width, memory):
        return f"{width} channels a head need {needed} bytes of shared memory, there are {memory}"
    return ""


def _metric_options(keys: Tensor) -> dict[str, int]:
    heads, width = keys.shape[1], keys.shape[3]
    return {"HEADS": heads, "WIDTH": width, "BLOCK_D": max(power(width), 16)}


@lru_cache
def _positions(tokens: int, r: int, protected: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """Stretches of protected tokens; the place of the first odd token in the result; and where a
    token goes that is like no other, the first that may be merged into."""
    even, odd, held = free_positions(tokens, protected)
    check_r(r, tokens, held)
    return _stretches(tuple(held)), len(held) + len(even) - r, odd[0] if odd else 0


def _stretches(held: tuple[int, ...]) -> tuple[int, ...]:
    """Ascending positions as ``(start, stop, start, stop, ...)``."""
    found: list[int] = []
    for position in held:
        if found and found[-1] == position:
            found[-1] += 1
        else:
            found += [position, position + 1]
    return tuple(found)


def _count_stretches(protected: Sequence[int]) -> int:
    return len(_stretches(tuple(sorted(set(protected))))) // 2
