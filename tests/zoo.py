"""Tiny models of every family, with seeded weights large enough for attention to matter.

    model = make_model("vit")               # fresh, in eval mode
    inputs = make_inputs("vit", batch=2)    # {"pixel_values": [2, 3, 32, 32]}

All have 64 patch tokens, three blocks of width 32 and, where there is a head, ten classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import reference_models
import torch
import transformers as hf
from torch import Tensor, nn

BLOCKS = 3
PATCHES = 64
CLASSES = 10
_SHARED: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
}
_IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 4}
_WIDE: dict[str, Any] = {**_SHARED, **_IMAGE, "intermediate_size": 64}
_LABELS: dict[str, Any] = {"num_labels": CLASSES}


class Family(NamedTuple):
    """How to make a model, how many of its first tokens are protected, what it returns."""

    make: Callable[[], nn.Module]
    protected: int
    output: str = "logits"  # or the field of the output that stands for it
    main_input: str = "pixel_values"
    shape: tuple[int, ...] = (3, 32, 32)


def _vit(**changes: Any) -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**(_WIDE | _LABELS | changes)))


def _deit() -> nn.Module:
    return hf.DeiTForImageClassification(hf.DeiTConfig(**_WIDE, **_LABELS))


def _deit_distilled() -> nn.Module:
    return hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**_WIDE, **_LABELS))


def _dinov2() -> nn.Module:
    config = hf.Dinov2Config(**_SHARED, **_IMAGE, **_LABELS, mlp_ratio=2, layerscale_value=0.7)
    return hf.Dinov2ForImageClassification(config)


def _dinov2_registers() -> nn.Module:
    config = hf.Dinov2WithRegistersConfig(
        **_SHARED, **_IMAGE, **_LABELS, mlp_ratio=2, layerscale_value=0.7, num_register_tokens=4
    )
    return hf.Dinov2WithRegistersForImageClassification(config)


def _clip_vision() -> nn.Module:
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(**_WIDE, projection_dim=24))


def _clip_vision_projection() -> nn.Module:
    return hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**_WIDE, projection_dim=24))


def _vit_msn() -> nn.Module:
    return hf.ViTMSNForImageClassification(hf.ViTMSNConfig(**_WIDE, **_LABELS))


def _ijepa() -> nn.Module:
    return hf.IJepaForImageClassification(hf.IJepaConfig(**_WIDE, **_LABELS))


def _ast() -> nn.Module:
    config = hf.ASTConfig(
        **_SHARED,
        **_LABELS,
        intermediate_size=64,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=64,
        num_mel_bins=64,
    )
    return hf.ASTForAudioClassification(config)


FAMILIES: dict[str, Family] = {
    "vit": Family(_vit, 1),
    "deit": Family(_deit, 2),
    "deit_distilled": Family(_deit_distilled, 2),
    "dinov2": Family(_dinov2, 1),
    "dinov2_registers": Family(_dinov2_registers, 5),
    "clip_vision": Family(_clip_vision, 1, "pooler_output"),
    "clip_vision_projection": Family(_clip_vision_projection, 1, "image_embeds"),
    "vit_msn": Family(_vit_msn, 1),
    "ijepa": Family(_ijepa, 0),
    "ast": Family(_ast, 2, main_input="input_values", shape=(64, 64)),
}
"""By name; every one of them must merge without a line of code of its own."""


REFERENCES: dict[str, Callable[..., reference_models.Result]] = {
    "vit": reference_models.vit_forward,
    "deit_distilled": reference_models.deit_forward,
    "ijepa": reference_models.ijepa_forward,
    "dinov2_registers": reference_models.dinov2_with_registers_forward,
}
"""Plain eager ToMe of whole models: ``REFERENCES[name](model, pixel_values, r, prop_attn)``."""


def make_model(name: str, seed: int = 0) -> Any:
    """A fresh model of a family, in eval mode, in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return scaled_up(FAMILIES[name].make())


def make_vit(**changes: Any) -> Any:
    """A ViT with some fields of its config changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return scaled_up(_vit(**changes))


def make_inputs(name: str, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs, by the names the model gives them."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    return {family.main_input: torch.randn(batch, *family.shape, generator=generator)}


def output_of(name: str, outputs: Any) -> Tensor:
    """The tensor that stands for what the model computes: its logits or its embedding."""
    value: Tensor = outputs[FAMILIES[name].output]
    return value


def scaled_up(model: Any, factor: float = 6.0) -> Any:
    """Larger weights, in eval mode: a freshly initialised ViT hardly attends at all."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest magnitude of the second."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.shape == theirs.shape, f"shapes {list(ours.shape)} and {list(theirs.shape)}"
    return float((ours - theirs).abs().max() / theirs.abs().max())
