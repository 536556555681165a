"""``tome::padded_size``: tokens that a padding mask hides, as sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.library import register

# A real token counts 1 or more, padding next to nothing: not 0, so that padding merged with
# padding still has a mean.
PADDED = 1e-6
_NEXT_TO_NOTHING = 1e-30


@register("padded_size(Tensor mask, Tensor like) -> Tensor")
def padded_size(mask: Tensor, like: Tensor) -> Tensor:
    """The sizes before any merge.

    Args:
        mask: bool, broadcasts to ``[B, H, N, N]`` as attention takes it, and is the same row for
            every head and query; True where a key is seen.
        like: the tokens ``[B, N, C]``. A mask that all images share says the same of each: every
            one has sizes of its own, as what merges differs.

    Returns:
        ``[B, N]`` float32: 1 for a real token, next to nothing for padding.

    Raises:
        ValueError: if the mask does not broadcast to these tokens.
    """
    batch, tokens = like.shape[:2]
    lengths = [1] * (4 - mask.ndim) + list(mask.shape)
    if len(lengths) != 4 or lengths[0] not in (1, batch) or lengths[3] not in (1, tokens):
        wanted = f"[{batch}, H, {tokens}, {tokens}]"
        raise ValueError(f"expected a mask that broadcasts to {wanted}, got {list(mask.shape)}")
    seen = mask.reshape(lengths)[:, 0, 0]
    size = torch.where(seen, 1.0, _NEXT_TO_NOTHING).to(torch.float32)
    return size.expand(batch, tokens)
