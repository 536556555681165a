"""``tome::padded_size``: tokens that a padding mask hides, as sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.library import register

# A real token counts 1 or more, padding next to nothing: not 0, so that padding merged with
# padding still has a mean.
PADDED = 1e-6
_NEXT_TO_NOTHING = 1e-30


@register("padded_size(Tensor mask) -> Tensor")
def padded_size(mask: Tensor) -> Tensor:
    """The sizes before any merge.

    Args:
        mask: ``[B, 1, N, N]`` bool, the same row for every query; True where a key is seen.

    Returns:
        ``[B, N]`` float32: 1 for a real token, next to nothing for padding.
    """
    return torch.where(mask[:, 0, 0], 1.0, _NEXT_TO_NOTHING).to(torch.float32)
