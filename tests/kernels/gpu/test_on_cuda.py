"""All kernels on a device: ``pytest -m cuda``. No network, no data folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from zoo import make_inputs, make_model

from benchmarks.gpu import on_device

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    with on_device.exact_products():
        yield


@pytest.mark.parametrize("name", on_device.CASES)
def test_kernels_are_right_on_the_device(name: str) -> None:
    torch.manual_seed(0)
    on_device.CASES[name]("cuda")


def on_cuda(name: str, batch: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model of a family and its inputs."""
    model = make_model(name).to("cuda", dtype)
    inputs = {
        key: value.to("cuda", dtype if value.is_floating_point() else value.dtype)
        for key, value in make_inputs(name, batch).items()
    }
    return model, inputs


def test_gradients_are_the_composite_s() -> None:
    on_device.gradients_of_a_model(*on_cuda("vit"))


def test_under_autocast_gradients_are_the_composite_s() -> None:
    on_device.gradients_under_autocast(*on_cuda("vit"))


def test_cuda_graphs_replay_on_other_images() -> None:
    on_device.cuda_graphs_replay(*on_cuda("vit", 3))


@pytest.mark.parametrize("name", ["vit", "dinov2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_harness_passes_on_the_device(name: str, dtype: torch.dtype) -> None:
    on_device.check_passes(*on_cuda(name, 3, dtype))
