"""Keys and index maps, drawn at random, to try operators and kernels on."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.counts.schedule import capped


def assignments(images: int, tokens: int, left: int, seed: int) -> Tensor:
    """Index maps ``[B, N]`` that send tokens anywhere, and something to each of ``left`` places."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randint(0, left, (images, tokens - left), generator=generator)
    every = torch.arange(left).expand(images, -1)
    shuffled = torch.randperm(tokens, generator=generator)
    return torch.cat([every, rest], dim=1)[:, shuffled]


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
