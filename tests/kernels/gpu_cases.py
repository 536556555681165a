"""What kernels for CUDA are held against: run in Triton's interpreter, or on a device."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.assignments import assignments
from tomepass import reference
from tomepass.kernels.gpu_match import match_triton
from tomepass.kernels.gpu_merge import merge_triton, sources_triton, unmerge_triton
from tomepass.ops.match import match
from tomepass.ops.merge import merge_size
from tomepass.ops.padding import PADDED
from tomepass.schedule import capped

NEXT_TO_NOTHING = PADDED * 1e-24
# Relative to the largest token: one rounding of the result, and a few of the sum.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def heads(
    images: int,
    tokens: int,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    count: int = 3,
    width: int = 24,
) -> Tensor:
    """Keys ``[B, H, N, D]`` as a projection leaves them."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(images, tokens, count, width, generator=generator)
    return made.to(device, dtype).transpose(1, 2)


def even_cosines(images: int, tokens: int, seed: int, *, device: str = "cpu") -> Tensor:
    """Keys ``[B, 1, N, 16]`` of length 2, of zeros and ones: cosines are quarters, many of them
    equal, and exact in whatever order they are summed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(images, 1, tokens, 16, generator=generator).argsort(-1)
    same = torch.rand(images, 1, tokens, 1, generator=generator) < 0.5
    return torch.where(same, order[:, :, :1] < 4, order < 4).float().to(device)


def counts(tokens: int, protected: list[int]) -> list[int]:
    """None, one, some, and all that can merge."""
    most = capped(tokens, tokens, tuple(sorted(set(protected))))
    return sorted({0, min(1, most), most // 2, most})


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


def _held(assign: Tensor, left: int) -> Tensor:
    places = torch.arange(left, device=assign.device)
    return (assign.unsqueeze(1) == places[:, None]).sum(-1, dtype=torch.int32)
