"""A small vision transformer for handwritten digits, with its held-out test images.

The model is a standard ``ViTForImageClassification``: 8 layers and 65 tokens (64 patches and the
class token), small enough to ship inside the package, so that demos and tests need no network.
``benchmarks/train_digits.py`` trains it.

The images are the test set of *Optical Recognition of Handwritten Digits* by E. Alpaydin and
C. Kaynak (UCI Machine Learning Repository, CC BY 4.0), as distributed with scikit-learn. The 360
of its 1797 images that were held out of training are stored here, pixel values unchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import ViTForImageClassification


__all__ = ["DIRECTORY", "IMAGE_SIZE", "load_images", "load_model", "upscale"]

DIRECTORY = Path(__file__).resolve().parent
"""The folder with ``config.json``, ``model.safetensors`` and ``images.safetensors``."""


IMAGE_SIZE = 32
"""Height and width of the model's input."""


MAX_VALUE = 16  # each stored pixel counts the inked dots of a 4x4 block of the scanned bitmap


def upscale(images_uint8: Tensor) -> Tensor:
    """Turn stored digits into model input; training and demos both go through here.

    Args:
        images_uint8: ``[B, 8, 8]``, pixel values 0 (paper) to 16 (ink).

    Returns:
        ``[B, 1, 32, 32]`` float32, bicubically enlarged, from -1 (paper) to 1 (ink).
    """
    from torch.nn.functional import interpolate

    ink = images_uint8.unsqueeze(1).float() / MAX_VALUE
    enlarged = interpolate(ink, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    # Bicubic interpolation overshoots at edges; clamping keeps the promised range.
    return enlarged.clamp(0.0, 1.0) * 2.0 - 1.0


def load_model(directory: Path = DIRECTORY) -> ViTForImageClassification:
    """Load the digits model in float32 and evaluation mode, without using the network.

    Its ``logits`` are ``[B, 10]`` for ``pixel_values`` of ``[B, 1, 32, 32]``.
    """
    from transformers import ViTForImageClassification

    # config.json asks for float32, so the weights, stored in float16, are widened on loading.
    model = ViTForImageClassification.from_pretrained(directory, local_files_only=True)
    model.train(False)
    return model


def load_images(directory: Path = DIRECTORY) -> tuple[Tensor, Tensor]:
    """Load the held-out test images, prepared as in training.

    Returns:
        ``pixel_values [B, 1, 32, 32]`` float32 in [-1, 1], and ``labels [B]`` int64 in 0..9.
    """
    from safetensors.torch import load_file

    tensors = load_file(directory / "images.safetensors")
    return upscale(tensors["images"]), tensors["labels"].long()
