"""Fixed positions of a sequence, as slices and ranges.

A tensor made from a list inside a composite operator is a constant that
``ExportedProgram.run_decompositions()`` loses, and a copy to the device on every call.
"""

from __future__ import annotations

import torch
from torch import Tensor


def runs(positions: list[int]) -> list[range]:
    """Ascending positions as evenly spaced runs."""
    found: list[range] = []
    for position in positions:
        last = found[-1] if found else range(0)
        if len(last) == 1:
            step = position - last[0]
            found[-1] = range(last[0], position + step, step)
        elif last and position == last.stop:
            found[-1] = range(last.start, position + last.step, last.step)
        else:
            found.append(range(position, position + 1))
    return found


def take(x: Tensor, positions: list[int]) -> Tensor:
    """``x`` at ascending positions of dimension 1."""
    parts: list[Tensor] = [
        torch.ops.aten.slice.Tensor(x, 1, run.start, run[-1] + 1, run.step)
        for run in runs(positions)
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim=1) if parts else x.narrow(1, 0, 0)


def gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """``x``, batch first, at each image's own indices ``[B, N']`` of dimension ``dim``.

    Raises:
        ValueError: if there are no indices for each image.
    """
    if index.ndim != 2 or index.shape[0] != x.shape[0]:
        raise ValueError(f"expected indices [{x.shape[0]}, N], got {list(index.shape)}")
    narrow, wide = [1] * x.ndim, list(x.shape)
    narrow[0], narrow[dim] = index.shape
    wide[0], wide[dim] = index.shape
    return x.gather(dim, index.reshape(narrow).expand(wide))


def without(index: Tensor, removed: list[int]) -> Tensor:
    """Indices into a sequence, for the sequence that some positions were taken out of."""
    shift = sum(((index > place).long() for place in removed), start=index.new_zeros(()))
    return index - shift


def sent(assign: Tensor, tokens: int) -> Tensor:
    """``[B, N]`` indices as ``[B, tokens, N]`` bool: which token goes to which."""
    return assign.unsqueeze(1) == torch.arange(tokens, device=assign.device)[:, None]


def constant(values: list[int], batch: int, device: torch.device) -> Tensor:
    """Ascending ints, the same for each image: ``[B, len(values)]`` int64."""
    parts = [torch.arange(run.start, run.stop, run.step, device=device) for run in runs(values)]
    return torch.cat(parts or [torch.arange(0, device=device)]).expand(batch, -1)
