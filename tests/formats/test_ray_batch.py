"""The Ray example: 200 images, two workers, one of them killed half-way."""

from __future__ import annotations

import csv
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "ray_batch.py"
IMAGES = 200


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


@pytest.mark.doors
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
    assert _label(exported, path, [0.5] * 3, [0.5] * 3) == label


def _label(exported: Any, path: str, mean: list[float], std: list[float]) -> int:
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    with torch.no_grad():
        logits = exported.program.module()(pixel_values=(pixels - mean) / std)["logits"]
    return int(logits.argmax())


@pytest.mark.doors
def test_the_command_writes_a_label_for_every_image(
    cluster: None,
    folder: Path,
    archive: Path,
    exported: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "labels.csv"
    words = [str(archive), str(folder), str(out), "--size", "32", "--workers", "1"]
    # Far from the standard, so that other labels come out.
    mean, std = ["0.1", "0.9", "0.5"], ["0.2", "0.6", "0.1"]
    monkeypatch.setattr("sys.argv", ["ray_batch.py", *words, "--mean", *mean, "--std", *std])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    (heading, *rows) = csv.reader(out.read_text().splitlines())
    assert heading == ["path", "label"]
    found = {path: int(label) for path, label in rows}
    assert sorted(found) == sorted(map(str, folder.iterdir()))
    expected = {p: _label(exported, p, [0.1, 0.9, 0.5], [0.2, 0.6, 0.1]) for p in [*found][:20]}
    assert {path: found[path] for path in expected} == expected
    usual = [_label(exported, path, [0.5] * 3, [0.5] * 3) for path in expected]
    assert usual != [*expected.values()]


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r"tomepass\[ray\]"):
        runpy.run_path(str(EXAMPLE))
