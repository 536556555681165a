"""Every method with a budget for each image: what each of the budgets makes of it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from table import ROWS, R
from zoo import make_inputs, relative_error

import tomepass
from tomepass.handover.adaptive import BUDGETS


@pytest.fixture
def limits(shared_models: Any) -> tuple[float, ...]:
    """Thresholds that give each of three images a budget of its own."""
    method = tomepass.ToMe(1, adaptive=True)
    inputs = make_inputs("vit", 3)
    return tomepass.apply(shared_models["vit"], method, example_inputs=inputs).method.adaptive


QUICK = ("evit", "threshold", "dynamicvit")
"""Six graphs a method are slow to make for all of them in every run."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.doors) for name in ROWS],
)
@torch.no_grad()
def test_each_image_gets_what_its_budget_makes_of_it(
    name: str, limits: tuple[float, ...], shared_models: Any
) -> None:
    model, pixels = shared_models["vit"], make_inputs("vit", 3)["pixel_values"]
    adaptive = tomepass.apply(
        model, ROWS[name].make(R, adaptive=limits), example_inputs={"pixel_values": pixels}
    )
    routes = adaptive.routes(pixels).tolist()
    assert sorted(routes) == [0, 1, 2]
    logits = adaptive(pixels).logits
    for image, budget in enumerate(routes):
        counts = [round(count * BUDGETS[budget]) for count in R]
        mine = pixels[image : image + 1]
        alone = tomepass.apply(model, ROWS[name].make(counts), example_inputs=mine)
        assert relative_error(logits[image : image + 1], alone(mine).logits) < 1e-5
