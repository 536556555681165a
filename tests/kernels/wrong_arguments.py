"""What kernels may be handed by mistake, generated: each argument of each kernel, wrong in turn.

A call must raise in words, or answer exactly what the composite operator does. Run as a script, it
makes all calls of the CPU's kernels, for a sanitizer to watch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tomepass.errors import TomeError
from tomepass.kernels import cpu
from tomepass.kernels.cpu import match_cpu, merge_bias_cpu, merge_cpu, pad_keys_cpu
from tomepass.ops.attending.log_size import log_size
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge, merge_size
from tomepass.ops.merging.side import merge_bias

IMAGES, TOKENS, LEFT, WIDTH = 3, 9, 6, 5
REFUSED = (ValueError, TomeError)


class Kernel(NamedTuple):
    """A kernel and what it computes.

    Args:
        operator: the kernel.
        meaning: the same in composite operators; None for an operand that contradicts others in
            its values, when all that is asked is that no other memory is read.
        arguments: a call of it that is right.
        loose: positions of operands with that right.
    """

    operator: Any
    meaning: Callable[..., Any]
    arguments: tuple[Any, ...]
    loose: tuple[int, ...] = ()


def keys(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(IMAGES, TOKENS, 2, WIDTH, generator=generator).transpose(1, 2)


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(IMAGES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def sizes() -> Tensor:
    size = torch.arange(1.0, IMAGES * TOKENS + 1).view(IMAGES, TOKENS)
    size[:, 7:] = 1e-30
    return size


def index_map() -> Tensor:
    return match(keys(), TOKENS - LEFT, [0], sizes())


def merged_and_sizes(x: Tensor, size: Tensor | None, assign: Tensor, left: int) -> Any:
    return merge(x, size, assign, left), merge_size(size, assign, left)


def padded_keys(keys: Tensor, values: Tensor, size: Tensor, missing: int) -> Any:
    lowest = torch.finfo(keys.dtype).min
    padded = [torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (keys, values)]
    bias = log_size(size, keys).expand(keys.shape[0], -1, -1, -1)
    return *padded, torch.nn.functional.pad(bias, (0, missing), value=lowest)


def bias() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, 2, TOKENS, TOKENS, generator=generator)


ON_CPU = {
    # Of four equal numbers the length is exact: cosines of one number for all channels tie exactly.
    "match": Kernel(match_cpu, match, (keys()[..., :4], TOKENS - LEFT, [0], sizes())),
    "merge": Kernel(merge_cpu, merged_and_sizes, (tokens(), sizes(), index_map(), LEFT)),
    "merge_bias": Kernel(merge_bias_cpu, merge_bias, (bias(), index_map(), LEFT)),
    "pad_keys": Kernel(pad_keys_cpu, padded_keys, (keys(), keys(1)[..., :3], sizes(), 7)),
}


def other_tensors(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Other tensors in the place of one, by what is wrong, or only unusual, about them."""
    yield "of fewer dimensions", x[0]
    yield "of more dimensions", x[None]
    yield "without dimensions", x.flatten()[0]
    yield "of one image", x[:1]
    yield "of no image", x[:0]
    for dim in range(x.ndim):
        yield f"shorter in dimension {dim}", x.narrow(dim, 0, x.shape[dim] - 1)
        yield f"empty in dimension {dim}", x.narrow(dim, 0, 0)
        yield f"longer in dimension {dim}", torch.cat([x, x], dim)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        yield f"of {dtype}", x.to(dtype)
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64):
        yield f"of {dtype}", x.nan_to_num().to(dtype)
    yield "on a meta device", x.to("meta")
    yield "turned", x.transpose(-1, 0).contiguous().transpose(-1, 0)
    yield "every other number", x.repeat_interleave(2, -1)[..., ::2]
    yield "every other image", x.repeat_interleave(2, 0)[::2]
    yield "one image for all", x[:1].expand(x.shape)
    yield "one token for all", x.narrow(-1, 0, 1).expand(x.shape)
    yield "behind other memory", torch.cat([x.flatten(), x.flatten()])[x.numel() :].view(x.shape)
    if x.is_floating_point():
        yield "all of zeros", torch.zeros_like(x)
        yield "not a number in places", torch.where(x > x.median(), float("nan"), x)
        yield "of lazy negatives", torch._neg_view(-x)
    else:
        for wrong in (-1, LEFT, TOKENS, 2**31, 2**32 + 1, 2**62, -(2**62)):
            if abs(wrong) < torch.iinfo(x.dtype).max:
                yield f"with {wrong} in it", torch.where(x == x.max(), wrong, x)


def other_values(x: Any) -> Iterator[tuple[str, Any]]:
    """Other counts and positions."""
    if isinstance(x, list):
        for other in ([], [0, 0], [2, 1], [-1], [TOKENS], [10**9], list(range(TOKENS))):
            yield f"{other}"[:20], other
    elif isinstance(x, int):
        for number in (0, 1, -1, -(2**40), TOKENS, TOKENS + 1, 2**40):
            yield f"{number}", number


def calls(kernel: Kernel) -> Iterator[tuple[str, int, tuple[Any, ...]]]:
    """Calls with one argument another: what it is, which one, and all arguments."""
    for place, given in enumerate(kernel.arguments):
        others = other_tensors(given) if isinstance(given, Tensor) else other_values(given)
        for name, other in others:
            changed = list(kernel.arguments)
            changed[place] = other
            yield f"argument {place} {name}", place, tuple(changed)
        if isinstance(given, Tensor):
            without = list(kernel.arguments)
            without[place] = None
            yield f"argument {place} left out", place, tuple(without)


def answer(operator: Any, arguments: tuple[Any, ...]) -> list[Tensor] | Exception:
    """What a call answers, or the error it raises."""
    try:
        found = operator(*arguments)
    except Exception as error:
        return error
    return [found] if isinstance(found, Tensor) else list(found)


def fault(kernel: Kernel, place: int, arguments: tuple[Any, ...]) -> str:
    """What is wrong about a kernel's answer; empty if it is the composite's, or an error."""
    got = answer(kernel.operator, arguments)
    if isinstance(got, Exception):
        # The dispatcher refuses what is no tensor, or on no such device, before a kernel is asked.
        known = isinstance(got, (*REFUSED, NotImplementedError))
        return "" if known else f"raises {type(got).__name__}: {got}"
    if place in kernel.loose:
        return ""
    expected = answer(kernel.meaning, arguments)
    if isinstance(expected, Exception):
        return f"answers where the composite raises {type(expected).__name__}: {expected}"
    return next(filter(None, map(_difference, got, expected)), "")


def _difference(got: Tensor, expected: Tensor) -> str:
    if (got.shape, got.dtype, got.device) != (expected.shape, expected.dtype, expected.device):
        return f"answers {got.shape} {got.dtype}, not {expected.shape} {expected.dtype}"
    if got.device.type == "meta" or not got.is_floating_point():
        same = got.device.type == "meta" or torch.equal(got, expected)
        return "" if same else f"answers {got}, not {expected}"
    # A product spreads what is not a number to all tokens of an image: a kernel need not.
    known = ~expected.isnan()
    rounding = 4 * torch.finfo(got.dtype).eps
    # The bias of padding is the lowest number there is.
    finite = expected[expected.abs() < torch.finfo(got.dtype).max].double()
    largest = float(finite.abs().max()) if len(finite) else 0.0
    near = torch.isclose(got[known], expected[known], rtol=0, atol=rounding * largest)
    return "" if bool(near.all()) else f"answers {got}, not {expected}"


def main() -> None:
    library = cpu.prototyped(ctypes.CDLL(os.environ["SANITIZED"]))
    cpu._library = lambda: library  # type: ignore[assignment]
    for kernel in ON_CPU.values():
        for _, _, arguments in calls(kernel):
            answer(kernel.operator, arguments)
    print("all calls made")


if __name__ == "__main__":
    main()
