"""Four families and how each is put together from embedded tokens, blocks, norm and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from module_names import attention_of, blocks_of, mlp_of
from reference_models import Block, pooled, siglip_attention, vit_blocks, weighted_mean
from torch import Tensor

from tomepass import reference


class Parts(NamedTuple):
    """An encoder taken apart; `head` makes the output of hidden states, sizes and sources."""

    embedded: Tensor
    blocks: list[Block]
    norm: Callable[[Tensor], Tensor]
    protected: int
    head: Callable[[Tensor, Tensor, Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def _vit(model: Any, inputs: dict[str, Tensor]) -> Parts:
    base = model.vit
    embedded = base.embeddings(inputs["pixel_values"])
    head = lambda hidden, *_: model.classifier(hidden[:, 0])  # noqa: E731
    return Parts(embedded, vit_blocks(base), base.layernorm, 1, head)


def _ast(model: Any, inputs: dict[str, Tensor]) -> Parts:
    base = model.audio_spectrogram_transformer
    embedded = base.embeddings(inputs["input_values"])
    head = lambda hidden, *_: model.classifier(hidden[:, :2].mean(1))  # noqa: E731
    return Parts(embedded, vit_blocks(base), base.layernorm, 2, head)


def _dinov2(model: Any, inputs: dict[str, Tensor]) -> Parts:
    base = model.dinov2_with_registers
    blocks = [
        Block(b.norm1, attention_of(b), b.layer_scale1, b.norm2, mlp_of(b), b.layer_scale2)
        for b in blocks_of(base)
    ]
    protected = 1 + model.config.num_register_tokens

    def head(hidden: Tensor, size: Tensor, source: Tensor) -> Tensor:
        patches = weighted_mean(hidden[:, protected:], size[:, protected:])
        logits: Tensor = model.classifier(torch.cat([hidden[:, 0], patches], dim=-1))
        return logits

    embedded = base.embeddings(inputs["pixel_values"])
    return Parts(embedded, blocks, base.layernorm, protected, head)


def _siglip(model: Any, inputs: dict[str, Tensor]) -> Parts:
    base = getattr(model, "vision_model", model)
    blocks = [
        Block(b.layer_norm1, siglip_attention(b.self_attn), _same, b.layer_norm2, b.mlp, _same)
        for b in base.encoder.layers
    ]

    def head(hidden: Tensor, size: Tensor, source: Tensor) -> Tensor:
        x = pooled(base.head.attention, base.head.probe, hidden, size)
        return (x + base.head.mlp(base.head.layernorm(x)))[:, 0]

    embedded = base.embeddings(inputs["pixel_values"])
    return Parts(embedded, blocks, base.post_layernorm, 0, head)


PARTS: dict[str, Callable[[Any, dict[str, Tensor]], Parts]] = {
    "vit": _vit,
    "dinov2_registers": _dinov2,
    "siglip_vision": _siglip,
    "ast": _ast,
}


def dense(hidden: Tensor, source: Tensor) -> Tensor:
    """Hidden states of the original tokens."""
    return reference.unmerge(hidden, source)
