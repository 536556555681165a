"""Pictures of merged tokens: what each final token holds, drawn on the image itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


def merged_regions(image: Array, source: Array, grid: tuple[int, int]) -> Array:
    """Paints every final token with the mean colour of the patches it holds, edges in between.

    Args:
        image: ``[H, W, 3]`` in 0..1.
        source: ``[h * w]`` final token of each patch, raster order.
        grid: ``(h, w)``.

    Returns:
        ``[H, W, 3]`` in 0..1.
    """
    rows, columns = grid
    height, width = image.shape[:2]
    cell_y = np.minimum(np.arange(height) * rows // height, rows - 1)
    cell_x = np.minimum(np.arange(width) * columns // width, columns - 1)
    token = source.reshape(rows, columns)[cell_y[:, None], cell_x[None, :]]
    painted = np.empty_like(image)
    for index in np.unique(token):
        inside = token == index
        painted[inside] = image[inside].mean(axis=0)
    edge = np.zeros(token.shape, dtype=bool)
    edge[:, 1:] |= token[:, 1:] != token[:, :-1]
    edge[1:, :] |= token[1:, :] != token[:-1, :]
    painted[edge] = 0.35 * painted[edge]
    return painted


def patch_grid(patches: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of the patches of a ``height`` x ``width`` image, None if there are none."""
    for rows in range(1, patches + 1):
        if patches % rows == 0 and rows * width == (patches // rows) * height:
            return rows, patches // rows
    return None


def save_merged_picture(
    images: Tensor,
    sources: Sequence[tuple[int, Tensor]],
    protected: tuple[int, ...],
    path: Path,
    captions: Sequence[str] = (),
    title: str = "",
) -> None:
    """One row an image: the image, then its merged tokens for each r.

    Args:
        images: ``[B, C, H, W]``, any value range.
        sources: ``(r, source map [B, N])`` pairs.
        protected: positions that are no patches.
        path: the PNG to write.
        captions: a line an image.
        title: over the whole picture.
    """
    # Not pyplot: it would keep the figure, and choose a backend for the whole process.
    from matplotlib.figure import Figure

    shown = _displayable(images, smallest=160)
    count, columns = len(shown), 1 + len(sources)
    figure = Figure(figsize=(1.9 * columns, 2.05 * count + 0.4), layout="constrained")
    axes = figure.subplots(count, columns, squeeze=False)
    patches = [i for i in range(sources[0][1].shape[1]) if i not in set(protected)]
    grid = patch_grid(len(patches), images.shape[2], images.shape[3])
    if grid is None:
        raise ValueError(f"{len(patches)} patches form no grid on {tuple(images.shape[2:])}")
    for row, image in enumerate(shown):
        axes[row][0].imshow(image, interpolation="nearest")
        if row < len(captions):
            axes[row][0].set_ylabel(captions[row], fontsize=8)
        for column, (r, source) in enumerate(sources, start=1):
            kept = source[row].numpy()[patches]
            axes[row][column].imshow(merged_regions(image, kept, grid), interpolation="nearest")
            left = len(np.unique(kept))
            axes[row][column].set_title(f"r={r}: {len(patches)} → {left} patches", fontsize=8)
        for axis in axes[row]:
            axis.set_xticks([])
            axis.set_yticks([])
    axes[0][0].set_title("image", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)


def _displayable(images: Tensor, smallest: int) -> Array:
    """``[B, H, W, 3]`` in 0..1, each image stretched to its range, small ones enlarged."""
    values = images.float().cpu().numpy().transpose(0, 2, 3, 1)
    low = values.min(axis=(1, 2, 3), keepdims=True)
    high = values.max(axis=(1, 2, 3), keepdims=True)
    values = (values - low) / np.maximum(high - low, 1e-6)
    if values.shape[-1] == 1:
        values = values.repeat(3, axis=-1)
    factor = max(1, -(-smallest // values.shape[1]))
    enlarged: Array = values.repeat(factor, axis=1).repeat(factor, axis=2)
    return enlarged
