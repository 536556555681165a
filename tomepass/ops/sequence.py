"""From which token goes to which, to where each one stands afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.arguments import held_positions
from tomepass.ops.positions import constant, sent


def in_sequence(into: Tensor, left: int, protected: list[int]) -> tuple[Tensor, Tensor]:
    """A shorter sequence: the protected tokens, then those that stay, each by position.

    Args:
        into: ``[B, N]`` int64, the position each token goes to: its own where it stays.
        left: N', how many stay, the same for each image.
        protected: positions that stay.

    Returns:
        ``[B, N]`` int64, each token's index, and ``[B, N']`` int64, the position at each index.
    """
    position = torch.arange(into.shape[1], device=into.device)
    held = constant(held_positions(into.shape[1], protected), into.shape[0], into.device)
    stays = into == position
    free = stays.scatter(1, held, False)
    own = torch.where(free, held.shape[1] + free.cumsum(-1) - 1, -1)
    first = torch.arange(held.shape[1], device=into.device).expand(into.shape[0], -1)
    own = own.scatter(1, held, first)
    stands = torch.where(sent(own, left), position, 0).sum(-1)
    return own.gather(1, into), stands


def partitioned(
    held: Tensor,
    sources: Tensor,
    destinations: Tensor,
    partner: Tensor,
    merged: Tensor,
    lost: Tensor,
    r: int,
) -> tuple[Tensor, Tensor]:
    """A shorter sequence: the protected tokens, the sources that stay, the destinations.

    Args:
        held: positions of the protected tokens; with the next two all there are, each ascending.
        sources: positions ``[A]``.
        destinations: positions ``[C]``.
        partner: ``[B, A]``, the destination each source would go to, as an index among them.
        merged: ``[B, A]`` bool, the sources that go there.
        lost: ``[B, A]`` bool, the sources that leave no place behind, r in each image.
        r: how many.

    Returns:
        ``[B, N]`` int64, each token's index, and ``[B, N - r]`` int64, the position at each index.
    """
    batch, device = merged.shape[0], merged.device
    first = held.shape[0] + sources.shape[0] - r
    place = held.shape[0] + torch.arange(sources.shape[0], device=device) - lost.cumsum(-1)
    before = torch.arange(held.shape[0], device=device).expand(batch, -1)
    after = (first + torch.arange(destinations.shape[0], device=device)).expand(batch, -1)
    goes = torch.cat([before, torch.where(merged, first + partner, place), after], dim=1)
    # What merged may leave its place behind, out of use: only what was lost has none.
    stays = torch.cat([before, torch.where(lost, -1, place), after], dim=1)
    position = torch.cat([held, sources, destinations])
    stands = torch.where(sent(stays, position.shape[0] - r), position, -1).amax(-1)
    return goes[:, position.argsort()], stands


def free_mask(tokens: int, protected: list[int], device: torch.device) -> Tensor:
    """``[N]`` bool, the positions that are not protected."""
    held = constant(held_positions(tokens, protected), 1, device)[0]
    return torch.ones(tokens, dtype=torch.bool, device=device).scatter(0, held, False)
