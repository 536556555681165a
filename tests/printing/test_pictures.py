"""Pictures of merged tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tomepass.printing.pictures import merged_regions, patch_grid, save_merged_picture


@pytest.mark.parametrize(
    ("patches", "height", "width", "grid"),
    [(196, 224, 224, (14, 14)), (8, 32, 64, (2, 4)), (2, 32, 16, (2, 1)), (7, 32, 32, None)],
)
def test_the_grid_has_the_image_proportions(
    patches: int, height: int, width: int, grid: tuple[int, int] | None
) -> None:
    assert patch_grid(patches, height, width) == grid


def test_a_region_has_the_mean_colour_of_its_patches_and_an_edge() -> None:
    image = np.zeros((8, 8, 3))
    image[:4, :4], image[:4, 4:] = 0.2, 0.6
    image[4:] = 1.0
    source = np.array([0, 0, 1, 2])  # the upper patches are one token
    painted = merged_regions(image, source, (2, 2))
    np.testing.assert_allclose(painted[:3, :], 0.4)
    np.testing.assert_allclose(painted[5:, :3], 1.0)
    assert (painted[4, :4] < 0.5).all(), "an edge where the token changes"
    assert painted[2, 4, 0] == pytest.approx(0.4), "no edge inside a token"


def test_the_picture_is_written(tmp_path: Path) -> None:
    images = torch.rand(2, 1, 8, 8)
    source = torch.arange(17).expand(2, 17)
    path = tmp_path / "tokens.png"
    save_merged_picture(images, [(4, source), (6, source)], (0,), path, ["a", "b"])
    with Image.open(path) as picture:
        assert picture.width > 600
        assert picture.height > 400


def test_tokens_that_form_no_grid_are_refused(tmp_path: Path) -> None:
    source = torch.arange(8).expand(1, 8)
    with pytest.raises(ValueError, match="form no grid"):
        save_merged_picture(torch.rand(1, 3, 8, 8), [(1, source)], (0,), tmp_path / "x.png")
