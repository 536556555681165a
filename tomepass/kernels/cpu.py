"""``tome::match_cpu``, ``merge_cpu``, ``merge_bias_cpu`` and ``pad_keys_cpu``: one pass each.

Compiled once, by the compiler that Inductor found, into Inductor's cache. They have no gradients
and cannot be exported: the composite operators of :mod:`tomepass.ops` stay what they compute.
The compiled code is given addresses: each operator checks what it was handed first, on fake tensors
as well.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
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
from tomepass.ops.library import register_for
from tomepass.ops.matching.match import check_r, free_positions

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What the kernels are compiled for."""


# As in cpu.cpp: even tokens are compared four at a time, with 32 odd ones.
_ROWS, _LANES = 4, 16


def check_match(keys: Tensor, r: int, protected: list[int], size: Tensor | None = None) -> None:
    """Raises ValueError if ``match_cpu`` does not take these."""
    batch, _, tokens, _ = lengths_of("match_cpu", "keys", keys, 4, DTYPES)
    check_operands("match_cpu", keys, size_operand(size, batch, tokens))
    check_r(r, tokens, protected)


def _match_result(keys: Tensor, r: int, protected: list[int], size: Tensor | None = None) -> Tensor:
    check_match(keys, r, protected, size)
    return keys.new_empty((keys.shape[0], keys.shape[2]), dtype=torch.int64)


@register_for(
    "CPU",
    "match_cpu(Tensor keys, SymInt r, int[] protected, Tensor? size=None) -> Tensor",
    _match_result,
)
def match_cpu(keys: Tensor, r: int, protected: list[int], size: Tensor | None = None) -> Tensor:
    """``tome::match`` for a dtype of :data:`DTYPES`: see there.

    Raises:
        ValueError: if ``r`` is more than can merge, or an operand is another than expected.
    """
    assign = _match_result(keys, r, protected, size)
    batch, heads, tokens, width = keys.shape
    if r == 0:
        return assign.copy_(torch.arange(tokens))
    keys = keys if keys.stride(3) == 1 else keys.contiguous()
    size = sizes_of(size, batch, tokens)
    even, odd, held = _sequence(tokens, tuple(protected))
    columns = -(-len(odd) // _LANES) * _LANES
    scratch = keys.new_empty((len(even) + _ROWS + columns) * width * batch, dtype=torch.float32)
    getattr(_library(), f"match_{DTYPES[keys.dtype]}")(
        keys.data_ptr(),
        (ctypes.c_int64 * 4)(*keys.stride()),
        *(batch, heads, tokens, width, r),
        *(even, len(even), odd, len(odd), held, len(held)),
        None if size is None else size.data_ptr(),
        scratch.data_ptr(),
        assign.data_ptr(),
        torch.get_num_threads(),
    )
    return assign


def check_merge(x: Tensor, size: Tensor | None, assign: Tensor, tokens: int) -> None:
    """Raises ValueError if ``merge_cpu`` does not take these."""
    batch, before, _ = lengths_of("merge_cpu", "x", x, 3, DTYPES)
    index = Operand("assign", assign, (batch, before), (torch.int64,))
    check_operands("merge_cpu", x, size_operand(size, batch, before), index)
    check_left("merge_cpu", tokens)


def _merge_result(
    x: Tensor, size: Tensor | None, assign: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    check_merge(x, size, assign, tokens)
    shape = (x.shape[0], tokens)
    return x.new_empty((*shape, x.shape[2])), x.new_empty(shape, dtype=torch.float32)


@register_for(
    "CPU",
    "merge_cpu(Tensor x, Tensor? size, Tensor assign, SymInt tokens) -> (Tensor, Tensor)",
    _merge_result,
)
def merge_cpu(x: Tensor, size: Tensor | None, assign: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """``tome::merge`` and ``tome::merge_size`` at once: see there.

    Summed in float32 and rounded once. A token that nothing merges with is copied bit by bit, and
    equal ones stay what they are. What is no index below ``tokens`` goes nowhere.

    Raises:
        ValueError: if an operand is another than expected.
    """
    merged, merged_size = _merge_result(x, size, assign, tokens)
    batch, before, width = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    size = sizes_of(size, batch, before)
    assign = assign.contiguous()
    getattr(_library(), f"merge_{DTYPES[x.dtype]}")(
        x.data_ptr(),
        (ctypes.c_int64 * 2)(*x.stride()[:2]),
        None if size is None else size.data_ptr(),
        assign.data_ptr(),
        *(batch, before, width, tokens),
        merged.data_ptr(),
        merged_size.data_ptr(),
        torch.get_num_threads(),
    )
    return merged, merged_size


def check_merge_bias(bias: Tensor, source: Tensor, tokens: int) -> None:
    """Raises ValueError if ``merge_bias_cpu`` does not take these."""
    name = "merge_bias_cpu"
    rank = 3 if bias is not None and bias.ndim == 3 else 4
    *leading, _, before = lengths_of(name, "bias", bias, rank, DTYPES)
    square = (*[1, None][-len(leading) :], before, before)
    check_operands(
        name,
        bias,
        Operand("bias", bias, square, DTYPES),
        Operand("source", source, (None, before), (torch.int64,)),
    )
    if before < 2:  # an axis of length 1 is one to broadcast
        raise ValueError(f"tome::{name}: expected a bias of two tokens or more, got {before}")
    check_left(name, tokens)


def _merge_bias_result(bias: Tensor, source: Tensor, tokens: int) -> Tensor:
    check_merge_bias(bias, source, tokens)
    return bias.new_empty(source.shape[0], bias.shape[-3], tokens, tokens)


@register_for(
    "CPU",
    "merge_bias_cpu(Tensor bias, Tensor source, SymInt tokens) -> Tensor",
    _merge_bias_result,
)
def merge_bias_cpu(bias: Tensor, source: Tensor, tokens: int) -> Tensor:
    """``tome::merge_bias`` of one bias for all images, ``[H, N, N]`` or ``[1, H, N, N]``.

    A sum a key instead of a product with ``[N, N']``: see there for what it computes.

    Raises:
        ValueError: if an operand is another than expected.
    """
    made = _merge_bias_result(bias, source, tokens)
    bias, source = bias.contiguous(), source.contiguous()
    heads, before = bias.shape[-3], bias.shape[-1]
    scratch = bias.new_empty(heads * before * (2 * before + 1), dtype=torch.float32)
    getattr(_library(), f"merge_bias_{DTYPES[bias.dtype]}")(
        bias.data_ptr(),
        source.data_ptr(),
        *(source.shape[0], heads, before, tokens),
        scratch.data_ptr(),
        made.data_ptr(),
        torch.get_num_threads(),
    )
    return made


def check_pad_keys(keys: Tensor, values: Tensor, size: Tensor, missing: int) -> None:
    """Raises ValueError if ``pad_keys_cpu`` does not take these."""
    name = "pad_keys_cpu"
    batch, heads, tokens, _ = lengths_of(name, "keys", keys, 4, DTYPES)
    like = Operand("values", values, (batch, heads, tokens, None), (keys.dtype,))
    sizes = size_operand(size, batch, tokens)._replace(optional=False)
    check_operands(name, keys, like, sizes)
    if missing < 0:
        raise ValueError(f"tome::{name}: expected a number of tokens to add, got {missing}")
    check_left(name, tokens + missing)


def _pad_keys_result(
    keys: Tensor, values: Tensor, size: Tensor, missing: int
) -> tuple[Tensor, Tensor, Tensor]:
    check_pad_keys(keys, values, size, missing)
    batch, heads, tokens, _ = keys.shape
    padded = tokens + missing
    made = (x.new_empty(batch, padded, heads, x.shape[3]).transpose(1, 2) for x in (keys, values))
    return (*made, keys.new_empty(batch, 1, 1, padded))  # type: ignore[return-value]


@register_for(
    "CPU",
    "pad_keys_cpu(Tensor keys, Tensor values, Tensor size, int missing)"
    " -> (Tensor, Tensor, Tensor)",
    _pad_keys_result,
)
def pad_keys_cpu(
    keys: Tensor, values: Tensor, size: Tensor, missing: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and ``tome::log_size`` for tokens of which the last ``missing`` weigh nothing.

    Args:
        keys: ``[B, H, N, D]``.
        values: ``[B, H, N, E]``, of the same dtype.
        size: ``[B, N]``, or ``[1, N]`` for all images.
        missing: tokens to add.

    Returns:
        keys and values with N + missing tokens, zeros at the end, and the bias of attention
        ``[B, 1, 1, N + missing]``, the lowest number there is at the end.

    Raises:
        ValueError: if an operand is another than expected.
    """
    made = _pad_keys_result(keys, values, size, missing)
    batch, heads, tokens, width = keys.shape
    keys, values = (x if x.stride(3) == 1 else x.contiguous() for x in (keys, values))
    sizes = sizes_of(size, batch, tokens)
    getattr(_library(), f"pad_keys_{DTYPES[keys.dtype]}")(
        *(keys.data_ptr(), (ctypes.c_int64 * 4)(*keys.stride())),
        *(values.data_ptr(), (ctypes.c_int64 * 4)(*values.stride())),
        sizes.data_ptr(),
        *(batch, heads, tokens, width, values.shape[3], tokens + missing),
        torch.finfo(keys.dtype).min,
        *(x.data_ptr() for x in made),
        torch.get_num_threads(),
    )
    return made


@lru_cache
def _sequence(tokens: int, protected: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """The even, odd and protected positions, as C arrays."""
    return tuple(
        (ctypes.c_int64 * len(positions))(*positions)
        for positions in free_positions(tokens, protected)
    )  # type: ignore[return-value]


@lru_cache
def _library() -> ctypes.CDLL:
    from torch._inductor.codecache import CppCodeCache

    # Inductor vectorises its loops itself, and tells the compiler not to.
    source, flags = Path(__file__).with_suffix(".cpp").read_text(), ("-ftree-loop-vectorize",)
    return prototyped(CppCodeCache.load(source, extra_flags=flags))


def prototyped(library: ctypes.CDLL) -> ctypes.CDLL:
    """A library made of ``cpu.cpp``, told what its functions take."""
    number, pointer, threads = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    sequence = [pointer, number] * 3
    for dtype in DTYPES.values():
        match, merge, merge_bias, pad_keys = (
            getattr(library, f"{name}_{dtype}")
            for name in ("match", "merge", "merge_bias", "pad_keys")
        )
        match.argtypes = [pointer] * 2 + [number] * 5 + sequence + [pointer] * 3 + [threads]
        merge.argtypes = [pointer] * 4 + [number] * 4 + [pointer] * 2 + [threads]
        pad_keys.argtypes = (
            [pointer] * 5 + [number] * 6 + [ctypes.c_float] + [pointer] * 3 + [threads]
        )
        merge_bias.argtypes = [pointer] * 2 + [number] * 4 + [pointer] * 2 + [threads]
        for kernel in (match, merge, merge_bias, pad_keys):
            kernel.restype = None
    return library
