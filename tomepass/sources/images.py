"""Images and labels from a folder, prepared as the model's processor does."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tomepass.errors import TomeError
from tomepass.sources.models import first_line

if TYPE_CHECKING:
    from torch import Tensor, nn


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class ImageSet:
    """Images as a model takes them.

    Args:
        pixel_values: ``[B, C, H, W]`` float32, normalised.
        labels: ``[B]`` class indices, None where unknown.
        names: a name an image.
    """

    pixel_values: Tensor
    labels: Tensor | None
    names: tuple[str, ...]


def load_images(
    model: nn.Module,
    name: str | Path,
    folder: str | Path,
    labels: str | Path | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Reads and prepares a folder of images with the model's own image processor.

    Images that already have the model's resolution are neither resized nor cropped.

    Args:
        model: gives the resolution.
        name: the directory or hub id the model came from, for its image processor.
        folder: searched for images, not recursively.
        labels: a CSV or TSV file of ``file name, class index``.
        limit: read this many images at most.
        progress: called with the number of images read and the number to read.

    Raises:
        TomeError: if there are no images, one does not decode, or one has no label.
    """
    paths = _image_paths(Path(folder))[:limit]
    classes = None if labels is None else _read_labels(Path(labels))
    processor = _processor(str(name))
    size = getattr(getattr(model, "config", None), "image_size", None)
    pixels = []
    for i, path in enumerate(paths):
        pixels.append(_prepare(processor, path, size))
        if progress is not None:
            progress(i + 1, len(paths))
    import torch

    names = tuple(p.name for p in paths)
    return ImageSet(torch.cat(pixels), _labels_of(names, classes), names)


def _image_paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise TomeError(f"no such image folder: {str(folder)!r}")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise TomeError(f"no images in {str(folder)!r}: looked for {', '.join(IMAGE_SUFFIXES)}")
    return paths


def _read_labels(path: Path) -> dict[str, int]:
    if not path.is_file():
        raise TomeError(f"no such labels file: {str(path)!r}")
    text = path.read_text()
    delimiter = "\t" if "\t" in text else ","
    classes = {}
    for number, row in enumerate(csv.reader(text.splitlines(), delimiter=delimiter)):
        if len(row) < 2:
            continue
        if not row[1].strip().isdigit():
            if number == 0:
                continue  # a heading
            raise TomeError(
                f"{path.name}, line {number + 1}: expected a class index, got {row[1]!r}"
            )
        classes[row[0].strip()] = int(row[1])
    return classes


def _labels_of(names: Sequence[str], classes: dict[str, int] | None) -> Tensor | None:
    if classes is None:
        return None
    if missing := [n for n in names if n not in classes]:
        raise TomeError(f"{len(missing)} images have no label, the first is {missing[0]!r}")
    import torch

    return torch.tensor([classes[n] for n in names])


def _processor(name: str) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise TomeError(
            f"no image processor could be loaded from {name!r}: {first_line(error)}",
            advice="save one beside the model: processor.save_pretrained(DIR)",
        ) from error


def _prepare(processor: Any, path: Path, size: Any) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise TomeError(
            f"image {path.name!r} does not decode: {first_line(error)}",
            advice="remove it from the folder, or replace it",
        ) from error
    options = {}
    if size is not None and image.size == (size, size):
        options = {"do_resize": False, "do_center_crop": False}
    pixels: Tensor = processor(images=image, return_tensors="pt", **options)["pixel_values"]
    return pixels
