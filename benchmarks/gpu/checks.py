"""Checks of the Triton kernels, on a device or in Triton's interpreter: each raises AssertionError.

The tests and ``python -m benchmarks gpu --only correctness`` call the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.operands import assignments, heads
from tomepass import reference
from tomepass.kernels.gpu.match import match_triton
from tomepass.kernels.gpu.merge import merge_norm_triton, merge_triton, sum_triton, unmerge_triton
from tomepass.kernels.gpu.sources import sources_triton
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge, merge_size
from tomepass.ops.merging.unmerge import unmerge
from tomepass.ops.padding import PADDED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEXT_TO_NOTHING = PADDED * 1e-24
# Relative to the largest token: one rounding of the result, and a few of the sum.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def check_map(keys: Tensor, r: int, protected: list[int], size: Tensor | None = None) -> None:
    """The map of a match equals the composite operator's."""
    got, expected = match_triton(keys, r, protected, size), match(keys, r, protected, size)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected), (tuple(keys.shape), r, protected)


def check_merge(
    images: int, tokens: int, left: int, width: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Merged tokens, sizes, and the way back equal the plain reference."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(images, tokens, width, generator=generator).to(device, dtype)
    assign = assignments(images, tokens, left, tokens).to(device)
    size = torch.randint(1, 300, (images, tokens), generator=generator).float().to(device)
    order, start = sources_triton(assign, left)
    assert torch.equal(order.long(), assign.argsort(dim=1, stable=True))
    assert torch.equal(start[:, 1:] - start[:, :-1], _held(assign, left))
    for sizes in (size, None):
        merged, total = merge_triton(x, None, sizes, assign, order, start)
        known = torch.ones_like(size) if sizes is None else sizes
        wide, _ = reference.merge(x.double().cpu(), known.cpu(), assign.cpu(), left)
        assert torch.equal(total, merge_size(sizes, assign, left))
        assert merged.dtype == dtype
        bound = ROUNDING[dtype] * x.double().abs().max().cpu()
        assert (merged.double().cpu() - wide).abs().max() <= bound
        back = unmerge_triton(merged, assign)
        assert torch.equal(back, merged.gather(1, assign.unsqueeze(-1).expand(-1, -1, width)))


# ---- strides -------------------------------------------------------------------------------


def check_strided_keys(device: str = "cpu") -> None:
    """Keys of any strides match alike."""
    keys = heads(2, 19, device=device)
    expected = match(keys, 6, [0])
    wide = torch.randn(2, 19, 3, 50, device=device)
    wide[..., 1:49:2] = keys.transpose(1, 2)
    last = keys.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for strided in (keys.contiguous(), wide[..., 1:49:2].transpose(1, 2), last):
        assert torch.equal(match_triton(strided, 6, [0]), expected)


def check_strided_tokens(device: str = "cpu") -> None:
    """Tokens, a sum before them and their index map may have any strides."""
    x, added = (torch.randn(2, 12, 10, device=device) for _ in range(2))
    assign = assignments(2, 12, 8, 0).to(device)
    size = torch.rand(2, 12, device=device) + 1
    expected = merge(x + added, size, assign, 8)
    order, start = sources_triton(_turned(assign), 8)
    wide = added.repeat(1, 2, 2)[:, ::2, :10].clone()
    wide[:] = added
    for first, second in ((x, added), (_turned(x), wide), (added, x)):
        for sources in ((order, start), (_turned(order), _turned(start))):
            merged, _ = merge_triton(first, second, _turned(size), assign, *sources)
            torch.testing.assert_close(merged, expected)


def check_sums(dtype: torch.dtype, device: str = "cpu") -> None:
    """Weighted sums and gathers of any strides, against float64."""
    assign, weight = assignments(2, 13, 6, 0).to(device), torch.rand(2, 13, device=device)
    sources = sources_triton(assign, 6)
    x = torch.randn(2, 13, 20, device=device).to(dtype)
    goes = torch.nn.functional.one_hot(assign, 6).transpose(1, 2).double()
    summed = (goes * weight.unsqueeze(1)) @ x.double()
    gathered = summed.gather(1, assign.unsqueeze(-1).expand(-1, -1, 20)) * weight.unsqueeze(-1)
    wide = torch.zeros(2, 26, 20, dtype=dtype, device=device)
    wide[:, ::2] = x
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for strided in (x, wide[:, ::2], _turned(x)):
        got = sum_triton(strided, _turned(weight), assign, *sources)
        assert got.dtype == dtype
        assert (got - summed).abs().max() <= bound * summed.abs().max()
        for places in (_turned(got), got.repeat_interleave(2, 1)[:, ::2]):
            back = unmerge_triton(places, _turned(assign), weight)
            assert (back - gathered).abs().max() <= 2 * bound * gathered.abs().max()


def _turned(x: Tensor) -> Tensor:
    """The same numbers, last dimension not the innermost."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


# ---- LayerNorm and gradients ---------------------------------------------------------------


def check_norm(width: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """A LayerNorm in the pass of a merge, against PyTorch's of what was merged."""
    x, assign = torch.randn(2, 12, width, device=device).to(dtype), assignments(2, 12, 8, 0)
    assign, size = assign.to(device), torch.rand(2, 12, device=device) + 1
    weight, bias = (torch.randn(width, device=device).to(dtype) for _ in range(2))
    sources = sources_triton(assign, 8)
    merged, after, normed, *_ = merge_norm_triton(
        x, None, size, assign, *sources, weight, bias, 1e-5
    )
    alone, alone_size = merge_triton(x, None, size, assign, *sources)
    assert torch.equal(merged, alone)
    assert torch.equal(after, alone_size)
    expected = torch.nn.functional.layer_norm(alone, (width,), weight, bias, 1e-5)
    assert normed.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    torch.testing.assert_close(normed, expected, rtol=tolerance, atol=tolerance)


# Three roundings one after another, which for bfloat16 the interpreter cuts off.
_GRADIENT = {torch.float32: 2e-6, torch.bfloat16: 2**-5, torch.float16: 2**-9}


def _leaves(dtype: torch.dtype, device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s, device=device).to(dtype).requires_grad_(True) for s in shapes]


def _near(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...], inputs: list[Tensor]) -> None:
    for got, wanted, given in zip(ours, exact, inputs, strict=True):
        assert got.dtype == given.dtype
        bound = _GRADIENT[got.dtype] * wanted.abs().max()
        assert (got.double() - wanted).abs().max() <= bound


def check_gradients(dtype: torch.dtype, device: str = "cpu") -> None:
    """Of a sum, a merge and its way back: those of the composite in float64."""
    inputs = _leaves(dtype, device, (2, 12, 10), (2, 12, 10))
    assign, size = assignments(2, 12, 8, 0).to(device), torch.rand(2, 12, device=device) + 1
    sources, grad = sources_triton(assign, 8), torch.randn(2, 12, 10, device=device).to(dtype)
    for sizes in (size, None):
        merged, _ = merge_triton(*inputs, sizes, assign, *sources)
        got = torch.autograd.grad(unmerge_triton(merged, assign), inputs, grad)
        wide = [x.detach().double().requires_grad_(True) for x in inputs]
        back = unmerge(merge(wide[0] + wide[1], sizes, assign, 8), assign, 1)
        _near(got, torch.autograd.grad(back, wide, grad.double()), inputs)


def check_norm_gradients(dtype: torch.dtype, weights: torch.dtype, device: str = "cpu") -> None:
    """Of a merge and the LayerNorm after it, both of which something reads."""
    inputs = _leaves(dtype, device, (2, 12, 16)) + _leaves(weights, device, (16,), (16,))
    assign, size = assignments(2, 12, 8, 0).to(device), torch.rand(2, 12, device=device) + 1
    made = merge_norm_triton(
        inputs[0], None, size, assign, *sources_triton(assign, 8), *inputs[1:], 1e-5
    )
    outputs = (made[0], made[2])
    grads = tuple(torch.randn(2, 8, 16, device=device).to(o.dtype) for o in outputs)
    got = torch.autograd.grad(outputs, inputs, grads)
    wide = [x.detach().double().requires_grad_(True) for x in inputs]
    merged = merge(wide[0], size, assign, 8)
    normed = torch.nn.functional.layer_norm(merged, (16,), wide[1], wide[2], 1e-5)
    exact = torch.autograd.grad((merged, normed), wide, tuple(g.double() for g in grads))
    _near(got, exact, inputs)


def check_registrations(device: str = "cpu") -> None:
    """Operators are registered as torch expects of them."""
    x, size = torch.randn(2, 6, 4, device=device), torch.rand(2, 6, device=device) + 1
    keys, x = heads(2, 6, device=device), x.requires_grad_(True)
    assign = match_triton(keys, 2, [0])
    sources = sources_triton(assign, 4)
    short, *affine = _leaves(torch.float32, device, (2, 4, 4), (4,), (4,))
    for operator, arguments in (
        (match_triton, (keys, 2, [0], size)),
        (sources_triton, (assign, 4)),
        (merge_triton, (x, None, size, assign, *sources)),
        (merge_norm_triton, (x, x, None, assign, *sources, *affine, 1e-5)),
        (sum_triton, (x, size, assign, *sources)),
        (unmerge_triton, (short, assign)),
    ):
        torch.library.opcheck(operator, arguments)


def _held(assign: Tensor, left: int) -> Tensor:
    places = torch.arange(left, device=assign.device)
    return (assign.unsqueeze(1) == places[:, None]).sum(-1, dtype=torch.int32)
