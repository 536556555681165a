"""One exported model for all doors: an export takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from zoo import make_vit

import tomepass
from tomepass import ToMe

BATCHES = (1, 2, 7)
METHOD = ToMe([8, 6])


class Exported(NamedTuple):
    """A model, its program, and what ``apply`` makes of a few batches."""

    model: nn.Module
    program: ExportedProgram
    expected: dict[int, tuple[Tensor, Tensor]]

    def errors(self, run: Any) -> dict[int, float]:
        """The greatest difference in the logits at each batch size."""
        return {
            batch: float((run({"pixel_values": x})[0] - logits).abs().max())
            for batch, (x, logits) in self.expected.items()
        }


@pytest.fixture(scope="session")
def exported() -> Exported:
    model = make_vit(num_hidden_layers=2)
    merged = tomepass.apply(model, METHOD)
    drawn = torch.Generator().manual_seed(1)
    images = {batch: torch.randn(batch, 3, 32, 32, generator=drawn) for batch in BATCHES}
    with torch.no_grad():
        expected = {batch: (x, merged(x).logits) for batch, x in images.items()}
    return Exported(model, tomepass.export(model, METHOD), expected)


@pytest.fixture(scope="session")
def archive(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, saved."""
    path = tmp_path_factory.mktemp("archive") / "vit.pt2"
    torch.export.save(exported.program, path)
    return path


@pytest.fixture(scope="session")
def model_dir(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    exported.model.save_pretrained(folder)  # type: ignore[operator]
    return folder
