"""Settings of the GPU benchmark: models from configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cpu.throughput import make_vit
from tomepass.methods import RLike


@dataclass(frozen=True)
class Setting:
    """A model, a batch, and what it is measured with.

    Args:
        model: makes it, in eval mode.
        pixels: a side of its images.
        batch: images a call.
        counts: tokens merged a block; one measurement each.
        target: the share of the MAC-ideal speed-up to reach; None where the goal is another.
    """

    model: Callable[[], nn.Module]
    pixels: int
    batch: int
    counts: tuple[RLike, ...]
    target: float | None = 0.9

    def images(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Random ones, on the device."""
        return torch.randn(self.batch, 3, self.pixels, self.pixels).to(device, dtype)


def vit(width: int, depth: int, pixels: int) -> nn.Module:
    """A ViT/16 classifier with heads of 64."""
    return make_vit(width, depth, width // 64, pixels).requires_grad_(False)


def dinov2() -> nn.Module:
    """DINOv2-L/14 at 518 pixels: 1370 tokens."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=518,
        patch_size=14,
    )
    return made(Dinov2Model, config)


def siglip() -> nn.Module:
    """The vision tower of SigLIP so400m/14 at 384 pixels: 729 tokens, 16 heads of 72."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    return made(SiglipVisionModel, config)


def made(model: Any, config: Any) -> nn.Module:
    """Random weights, the same every time."""
    torch.manual_seed(0)
    built: nn.Module = model(config)
    return built.eval().requires_grad_(False)


def vit_b(pixels: int = 224) -> nn.Module:
    """ViT-B/16."""
    return vit(768, 12, pixels)


SETTINGS: dict[str, Setting] = {
    "vit_b": Setting(vit_b, 224, 256, (13, 16)),
    "vit_l": Setting(lambda: vit(1024, 24, 384), 384, 64, (23,)),
    "dinov2_l": Setting(dinov2, 518, 32, (50,)),
    "siglip": Setting(siglip, 384, 64, (24,)),
    "long": Setting(lambda: vit_b(1024), 1024, 8, (300,)),
    "batch1": Setting(vit_b, 224, 1, (16,), target=None),
}
"""Compared with their unmerged compiled forms."""


TRAINING = Setting(vit_b, 224, 128, (16,), target=None)

TINY = Setting(lambda: vit(128, 3, 64), 64, 2, (4,))
"""For machines without a GPU: what runs, not how fast."""
