"""Example inputs from a HuggingFace config: what a model takes, without being told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tomepass.errors import TomeError


def example_inputs(model: nn.Module, batch: int = 2) -> dict[str, Tensor]:
    """Random inputs for ``model`` at its configured resolution: ``{"pixel_values": [B, C, H, W]}``.

    Spectrogram models get ``{"input_values": [B, T, F]}``.

    Raises:
        TomeError: if the config does not say what the model takes.
    """
    name = str(getattr(model, "main_input_name", None))
    try:
        shape = _SHAPES[name](getattr(model, "config", None)) if name in _SHAPES else None
    except (TypeError, ValueError) as error:  # sizes written in a way of its own
        raise _unread(model) from error
    if shape is None or min(shape) < 1:
        raise _unread(model)
    parameter = next(model.parameters(), torch.empty(0))
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    # A generator of its own: making an example must not disturb the user's random state.
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(batch, *shape, generator=generator)
    return {name: value.to(device=parameter.device, dtype=dtype)}


def _unread(model: nn.Module) -> TomeError:
    return TomeError(
        f"what {type(model).__name__} takes cannot be read off its config",
        advice='give example_inputs, for example {"pixel_values": torch.randn(2, 3, 224, 224)}',
    )


def _image(config: Any) -> tuple[int, ...] | None:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None)
    channels = getattr(config, "num_channels", None)
    # A video has one more dimension, in an order that configs do not tell.
    if size is None or channels is None or hasattr(config, "num_frames"):
        return None
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return (int(channels), int(height), int(width))


def _spectrogram(config: Any) -> tuple[int, ...] | None:
    frames, mels = getattr(config, "max_length", None), getattr(config, "num_mel_bins", None)
    return None if frames is None or mels is None else (int(frames), int(mels))


_SHAPES: dict[str, Callable[[Any], tuple[int, ...] | None]] = {
    "pixel_values": _image,
    "input_values": _spectrogram,
}
