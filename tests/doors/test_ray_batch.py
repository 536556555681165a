"""The Ray example: 200 images, two workers, one of them killed half-way."""

from __future__ import annotations

import os
import runpy
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "ray_batch.py"
IMAGES = 200

pytestmark = pytest.mark.doors


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ray = pytest.importorskip("ray")
    # Workers at their usual low priority starve beside other tests.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "images"
    made.mkdir()
    drawn = np.random.default_rng(0)
    for i in range(IMAGES):
        pixels = drawn.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(made / f"{i:03}.png")
    return made


def test_every_image_is_answered_once_though_a_worker_is_killed(
    cluster: None, folder: Path, archive: Path, exported: Any, tmp_path: Path
) -> None:
    example = runpy.run_path(str(EXAMPLE))
    base: Any = example["Classifier"]
    killed = tmp_path / "killed"

    class Killed(base):
        """Dies on image 100 the first time it is seen, as if its machine had."""

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            if not killed.exists() and any("100.png" in path for path in batch["path"]):
                killed.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            found: dict[str, Any] = super().__call__(batch)
            return found

    answered = example["classify"](str(archive), str(folder), size=32, worker=Killed)
    assert killed.exists()
    assert {Path(path).name for path in answered} == {f"{i:03}.png" for i in range(IMAGES)}
    path, label = next(iter(answered.items()))
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        logits = exported.program.module()(pixel_values=(pixels - 0.5) / 0.5)["logits"]
    assert int(logits.argmax()) == label
