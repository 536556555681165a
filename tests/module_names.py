"""The parts of ViT, DeiT, I-JEPA and DINOv2 by whichever names transformers (4.57 to 5.x) gives.

First the newer name, then the older one: `model.layers` was `model.encoder.layer`, the attention's
`q_proj` was `attention.query`, its `o_proj` was `output.dense`, and a block's `mlp` was split into
`intermediate` and `output`. DINOv2 has kept the names of its blocks and their MLPs.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

Module = Callable[[Tensor], Tensor]


class Attention(NamedTuple):
    """The projections of one attention, and what its scores are multiplied by."""

    query: Module
    key: Module
    value: Module
    out: Module
    head_dim: int
    scale: float


def blocks_of(model: Any) -> Iterable[Any]:
    """The blocks of a headless model, in order."""
    blocks: Iterable[Any] = model.layers if hasattr(model, "layers") else model.encoder.layer
    return blocks


def attention_of(block: Any) -> Attention:
    """The attention of a block."""
    a = block.attention
    if hasattr(a, "q_proj"):
        return Attention(a.q_proj, a.k_proj, a.v_proj, a.o_proj, a.head_dim, a.scaling)
    inner, out = a.attention, a.output.dense
    head_dim = inner.attention_head_size
    return Attention(inner.query, inner.key, inner.value, out, head_dim, inner.scaling)


def mlp_of(block: Any) -> Module:
    """The MLP of a block, without its residual sum."""
    if hasattr(block, "mlp"):
        mlp: Module = block.mlp
        return mlp
    # `block.output` is called with the residual too, and adds it.
    return lambda x: block.output.dense(block.intermediate(x))
