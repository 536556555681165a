"""A model may take scalars beside its images: a count, a temperature, a flag."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import Encoder, make, pixels
from torch import Tensor

import tomepass
from tomepass import ToMe, TomeBackend
from tomepass.capture.exported import capture_module
from tomepass.planning.macs import batch_of


class Scaled(Encoder):
    """The scalar comes first, last, or between."""

    def forward(self, count: Tensor, pixels: Tensor, scale: Tensor | None = None) -> Any:
        out = super().forward(pixels) / count
        return out if scale is None else out * scale


@torch.no_grad()
@pytest.mark.parametrize("scale", [None, torch.tensor(0.5)])
def test_scalars_beside_images_change_nothing(scale: Tensor | None) -> None:
    model = make(Scaled)
    inputs = {"count": torch.tensor(3.0), "pixels": pixels(3)}
    if scale is not None:
        inputs["scale"] = scale
    for r in (0, 4):
        merged = tomepass.apply(model, r=r, example_inputs=inputs)
        plain = tomepass.apply(make(), r=r, example_inputs=pixels(3))
        expected = plain(pixels(3)) / 3 * (1 if scale is None else scale)
        compiled = torch.compile(model, backend=TomeBackend(ToMe(r), inner="eager"))
        for ours in (merged(**inputs), compiled(**inputs)):
            assert torch.allclose(ours, expected, atol=1e-6)
    assert merged.report(inputs).inputs.startswith("count float32[]")
    assert merged.report(inputs).macs_original == plain.report(pixels(3)).macs_original


def test_the_batch_is_the_dimension_that_is_not_fixed() -> None:
    class Placed(Encoder):
        def forward(self, places: Tensor, pixels: Tensor) -> Any:
            x = self.embed(pixels) + places[:, None]
            for block in self.blocks:
                x = block(x)
            return self.read(self.final(x))

    inputs = {"pixels": pixels(3), "places": torch.ones(37)}
    captured = capture_module(make(Placed), inputs).graph
    first, second = (n for n in captured.graph.nodes if n.name in captured.data)
    first.prepend(second)
    assert batch_of(captured) == 2
