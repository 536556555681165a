"""``tome::padded_size``: tokens that a padding mask hides, as sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.ops.arguments import check_map, each_image
from tomepass.ops.library import register
from tomepass.ops.positions import sent

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


@register("seen_stands(Tensor stands, Tensor assign, Tensor size) -> Tensor")
def seen_stands(stands: Tensor, assign: Tensor, size: Tensor) -> Tensor:
    """Which token stands at each place: padding only where nothing else is.

    Where a token that is seen has nothing left to merge with but padding, it stands for both.

    Args:
        stands: ``[B, N']`` int64, the position of the token that would stand there.
        assign: ``[B, N]`` int64, the place each token goes to.
        size: ``[B, N]``, or ``[1, N]`` for all images.

    Returns:
        ``[B, N']`` int64: of several tokens that are seen the last, where padding would stand.

    Raises:
        ValueError: if sizes or indices are not one a token.
    """
    check_map(assign)
    seen = each_image(size, *assign.shape) >= PADDED
    position = torch.arange(assign.shape[1], device=assign.device)
    here = sent(assign, stands.shape[1]) & seen.unsqueeze(1)
    other = torch.where(here, position, -1).amax(-1)
    stays = seen.gather(1, stands) | (other < 0)
    return torch.where(stays, stands, other)
