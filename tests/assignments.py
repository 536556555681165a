"""Index maps to test operators with."""

from __future__ import annotations

import torch
from torch import Tensor


def assignments(images: int, tokens: int, left: int, seed: int) -> Tensor:
    """Index maps ``[B, N]`` that send tokens anywhere, and something to each of ``left`` places."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.randint(0, left, (images, tokens - left), generator=generator)
    every = torch.arange(left).expand(images, -1)
    shuffled = torch.randperm(tokens, generator=generator)
    return torch.cat([every, rest], dim=1)[:, shuffled]
