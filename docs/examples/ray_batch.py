"""Classifies a folder of images with Ray Data; each worker loads the exported program once.

    tomepass export --model DIR --r 16 --to pt2 -o vit_r16.pt2
    python ray_batch.py vit_r16.pt2 IMAGES labels.csv --workers 2

Ray splits the folder, starts the workers, and gives the images of a worker that died to another.
Needs Ray and PyTorch (pip install 'tomepass[ray]'); tomepass itself is not imported.
"""

from __future__ import annotations

import argparse
import csv
from typing import Any

import numpy as np
import torch

try:
    import ray
except ImportError as error:
    raise SystemExit(f"this needs Ray: pip install 'tomepass[ray]' ({error})") from error


class Classifier:
    """What a worker holds: the program. It is called with batches of rows.

    Args:
        archive: written by ``torch.export.save``, with a dynamic batch.
        mean: of each channel, as the model's image processor has it.
        std: of each channel.
    """

    def __init__(self, archive: str, mean: list[float], std: list[float]) -> None:
        torch.set_num_threads(1)  # a worker has one core
        self.model = torch.export.load(archive).module()
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """``image`` ``[B, H, W, 3]`` uint8 and ``path`` ``[B]`` to ``path`` and ``label``."""
        images = torch.from_numpy(np.stack(batch["image"])).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            logits = self.model(pixel_values=(images - self.mean) / self.std)["logits"]
        return {"path": batch["path"], "label": logits.argmax(-1).numpy()}


def classify(
    archive: str,
    folder: str,
    *,
    size: int = 224,
    workers: int = 2,
    batch: int = 16,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    worker: type = Classifier,
) -> dict[str, int]:
    """The label of every image in a folder, by its path."""
    half = [0.5, 0.5, 0.5]
    images = ray.data.read_images(folder, size=(size, size), mode="RGB", include_paths=True)
    labelled = images.map_batches(
        worker,
        fn_constructor_args=(archive, mean or half, std or half),
        batch_size=batch,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
    )
    answered: dict[str, int] = {}
    for row in labelled.iter_rows():
        assert row["path"] not in answered, f"answered twice: {row['path']}"
        answered[row["path"]] = int(row["label"])
    return answered


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive")
    parser.add_argument("folder")
    parser.add_argument("out", help="a CSV file: path, label")
    parser.add_argument("--size", type=int, default=224, help="a side of the images")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    channels = {"type": float, "nargs": 3, "metavar": ("R", "G", "B"), "default": [0.5] * 3}
    parser.add_argument("--mean", help="as in preprocessor_config.json", **channels)
    parser.add_argument("--std", help="the same", **channels)
    given = vars(parser.parse_args())
    out = given.pop("out")
    answered = classify(given.pop("archive"), given.pop("folder"), **given)
    with open(out, "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *sorted(answered.items())])


if __name__ == "__main__":
    main()
