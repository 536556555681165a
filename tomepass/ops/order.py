"""Orders that every device agrees on: ranks whose ties go to the lower position, and shuffles."""

from __future__ import annotations

import random

import torch
from torch import Tensor


def rank(similarity: Tensor, among: Tensor | None = None) -> Tensor:
    """Place of each edge, ``[B, A]``: 0 the largest; ties by position.

    Counting the edges before each one needs no sort and fuses into one reduction.

    Args:
        among: ``[B, A]`` bool, which edges are counted; all if None.
    """
    edges = similarity.shape[-1]
    position = torch.arange(edges, device=similarity.device)
    other, this = similarity.unsqueeze(-2), similarity.unsqueeze(-1)
    before = (other > this) | ((other == this) & (position[None, :] < position[:, None]))
    if among is not None:
        before = before & among.unsqueeze(-2)
    return before.sum(-1)


def shuffle(tokens: int, seed: int) -> tuple[int, int, int]:
    """Step, start and prime of a shuffle by arithmetic: a list drawn would be a constant."""
    prime = tokens + 1
    while any(prime % divisor == 0 for divisor in range(2, int(prime**0.5) + 1)):
        prime += 1
    drawn = random.Random(seed)
    return drawn.randrange(1, prime), drawn.randrange(prime), prime
