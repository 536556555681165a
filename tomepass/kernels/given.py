"""What kernels are given, checked before they touch memory: they read by address.

Where a graph is put on kernels (``choose.py``, ``choose_gpu.py``) the same checks run on what its
nodes carry: what one would refuse keeps its composite operator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, fx

from tomepass.graphs.origin import value_of
from tomepass.ops.arguments import each_image

# Kernels keep positions in 32 bits.
_MOST_TOKENS = 2**31 - 1


class Operand(NamedTuple):
    """A tensor, and what it has to be.

    Args:
        name: for the error.
        tensor: None where there is none.
        shape: the lengths of its dimensions, None for any.
        dtypes: those that will do; None for any numbers, which are converted.
        optional: whether there may be none.
    """

    name: str
    tensor: Tensor | None
    shape: tuple[Any, ...]
    dtypes: Collection[torch.dtype] | None = None
    optional: bool = False


def lengths_of(
    kernel: str, name: str, x: Tensor, rank: int, dtypes: Collection[torch.dtype]
) -> torch.Size:
    """The lengths of the operand that a kernel's others go by.

    Raises:
        ValueError: if it has another rank or dtype.
    """
    check_operands(kernel, x, Operand(name, x, (None,) * rank, dtypes))
    return x.shape


def check_operands(kernel: str, like: Tensor, *operands: Operand) -> None:
    """Checks rank, lengths, dtype and device of what a kernel reads.

    Args:
        kernel: its name, for the error.
        like: a tensor on the kernel's device.
        operands: all others, and what each has to be.

    Raises:
        ValueError: which says what was expected of which operand, and what came.
    """
    for operand in operands:
        if operand.tensor is None and not operand.optional:
            raise ValueError(f"tome::{kernel}: expected {operand.name}, got None")
        if operand.tensor is None:
            continue
        if wrong := _wrong(operand.tensor, operand, like.device):
            raise ValueError(f"tome::{kernel}: expected {operand.name} {wrong}")


def _wrong(x: Tensor, operand: Operand, device: torch.device) -> str:
    lengths = ["any" if length is None else length for length in operand.shape]
    if x.ndim != len(lengths) or any(
        length is not None and given != length
        for given, length in zip(x.shape, operand.shape, strict=True)
    ):
        return f"[{', '.join(map(str, lengths))}], got {list(x.shape)}"
    if operand.dtypes is None and x.dtype.is_complex:
        return f"of real numbers, got {x.dtype}"
    if operand.dtypes is not None and x.dtype not in operand.dtypes:
        return f"of {' or '.join(map(str, operand.dtypes))}, got {x.dtype}"
    if x.device.type != device.type or x.device.index not in (device.index, None):
        return f"on {device}, got {x.device}"
    if any(isinstance(length, int) and length > _MOST_TOKENS for length in x.shape):
        return f"of at most {_MOST_TOKENS} a dimension, got {list(x.shape)}"
    return ""


def why_not(check: Callable[..., None], node: fx.Node, args: Sequence[Any] = ()) -> str:
    """Why a kernel does not take what a node gives its operator; empty if it does.

    Args:
        check: raises a ValueError at the operands that the kernel does not take.
        node: of a graph.
        args: operands to check instead of its own.
    """
    if node.kwargs and not args:
        return "operands by name"
    given = [value_of(a) if isinstance(a, fx.Node) else a for a in args or node.args]
    try:
        check(*given)
    except ValueError as error:
        return str(error)
    return ""


def check_left(kernel: str, tokens: int) -> None:
    """Raises ValueError if there is no such number of tokens to be left."""
    if isinstance(tokens, int) and not 1 <= tokens <= _MOST_TOKENS:
        raise ValueError(f"tome::{kernel}: expected tokens to be left, got {tokens}")


def size_operand(size: Tensor | None, batch: int, tokens: int, name: str = "size") -> Operand:
    """Sizes of every image, or one row for all of them, or none."""
    shared = size is not None and size.ndim == 2 and size.shape[0] == 1
    return Operand(name, size, (1 if shared else batch, tokens), optional=True)


@overload
def sizes_of(size: Tensor, batch: int, tokens: int) -> Tensor: ...


@overload
def sizes_of(size: None, batch: int, tokens: int) -> None: ...


def sizes_of(size: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """Sizes as kernels read them: float32, a row an image, one after the other."""
    if size is None:
        return None
    return each_image(size, batch, tokens).to(torch.float32).contiguous()
