"""Gradients flow through the merges and not through the matching, in both doors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from depth import at_hand
from reference_models import siglip_vision_forward, vit_for_masked_images_forward
from torch import Tensor
from zoo import REFERENCES, make_inputs, make_model, output_of

import tomepass
from tomepass import ToMe, TomeBackend

# A class token, two, a mean, both, attention pooling, a grid.
FORWARDS = {
    **REFERENCES,
    "siglip_vision": siglip_vision_forward,
    "masked_images": vit_for_masked_images_forward,
}


def gradients(model: Any, logits: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Of a weighted sum of the logits, for every parameter that takes part."""
    model.zero_grad()
    values = logits()
    (values * torch.linspace(-1.0, 2.0, values.shape[-1])).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest relative difference; a gradient that is zero in theory counts as zero."""
    assert ours.keys() == theirs.keys()
    scale = max(float(g.abs().max()) for g in theirs.values())
    return max(
        float((ours[n] - g).abs().max()) / max(float(g.abs().max()), 1e-3 * scale)
        for n, g in theirs.items()
    )


@pytest.mark.parametrize("name", at_hand(FORWARDS, ["masked_images"]))
def test_gradients_equal_the_references_in_both_doors(name: str) -> None:
    model, inputs = make_model(name), make_inputs(name)
    if name == "siglip_vision":  # its gradients are too steep for the rounding of float32
        model, inputs = model.double(), {k: v.double() for k, v in inputs.items()}
    model.train()  # no dropout in it: training mode is another capture of the same function
    expected = gradients(model, lambda: FORWARDS[name](model, inputs["pixel_values"], 8).output)
    unmerged = gradients(model, lambda: output_of(name, model(**inputs)))
    assert worst(unmerged, expected) > 1e-2

    merged = tomepass.apply(model, r=8)
    assert worst(gradients(model, lambda: output_of(name, merged(**inputs))), expected) < 2e-5
    backend = TomeBackend(ToMe(r=8), inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    got = gradients(model, lambda: output_of(name, compiled(**inputs)))
    assert worst(got, expected) < 2e-5


@pytest.mark.deep
def test_gradients_of_a_compiled_applied_module() -> None:
    model, inputs = make_model("ijepa"), make_inputs("ijepa")
    merged = tomepass.apply(model, r=8)
    expected = gradients(model, lambda: merged(**inputs).logits)
    compiled = torch.compile(merged, backend="aot_eager", fullgraph=True)
    assert worst(gradients(model, lambda: compiled(**inputs).logits), expected) < 2e-5


def test_gradients_reach_the_input() -> None:
    model, pixels = make_model("vit"), make_inputs("vit")["pixel_values"].requires_grad_()
    expected = REFERENCES["vit"](model, pixels, 8).output
    (wanted,) = torch.autograd.grad(expected.sum(), pixels)
    (got,) = torch.autograd.grad(tomepass.apply(model, r=8)(pixels).logits.sum(), pixels)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_frozen_parameters_get_no_gradient() -> None:
    model, inputs = make_model("vit"), make_inputs("vit")
    model.vit.requires_grad_(False)
    found = gradients(model, lambda: tomepass.apply(model, r=8)(**inputs).logits)
    assert sorted(found) == ["classifier.bias", "classifier.weight"]


def test_a_few_steps_learn() -> None:
    """The optimiser holds the model's parameters; the merged module follows them."""
    model, inputs = make_model("ijepa"), make_inputs("ijepa", 8)
    labels = torch.arange(8)
    merged = tomepass.apply(model, r=8).train()
    optimiser = torch.optim.Adam(merged.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = merged(**inputs, labels=labels).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert len(merged._captures) == 2  # one ahead, one with labels
