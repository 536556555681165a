"""Rotary positions: whole models against plain references, and what is exact in spite of them.

Tokens alike but for their places are turned differently, so merging them is no longer exact. What
else a model does with merged tokens must be, which shows where all tokens are turned alike.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import duplicates, pixels
from generated import Kind, Position, Readout, build
from reference_models import vjepa2_classifier_forward
from torch import nn
from zoo import FAMILIES, make_inputs, relative_error

import tomepass
from tomepass import ToMe
from tomepass.proof.duplicates import DuplicatesResult, check_duplicates

# V-JEPA 2's classifier holds its encoder.
TURNED = [
    pytest.param(name, marks=[pytest.mark.deep] if name == "vjepa2" else [])
    for name, family in FAMILIES.items()
    if family.rotary
]


def duplicates_result(model: nn.Module, r: Any, inputs: dict[str, Any]) -> DuplicatesResult:
    with torch.no_grad():
        merged = tomepass.apply(model, r=r, example_inputs=inputs)
        return check_duplicates(model, merged.captured(inputs).capture, merged.method, inputs)


@pytest.mark.parametrize("name", TURNED)
def test_a_family_is_lossless_on_duplicates_that_are_turned_alike(
    name: str, shared_models: Any
) -> None:
    found = duplicates_result(shared_models[name], [5, 0, 4], make_inputs(name))
    assert found.blind is None
    assert found.error < 1e-5
    assert found.control > 1e-2


@pytest.mark.parametrize(
    ("position", "readout"),
    [
        ("rotary", "attention"),
        ("rotary", "mean"),
        ("patch rotary", "multihead"),
        ("patch rotary", "dense"),
    ],
)
def test_so_is_any_encoder(position: Position, readout: Readout) -> None:
    model = build(Kind(position=position, readout=readout, end=1))
    found = duplicates_result(model, [6, 5], {"pixels": pixels(2)})
    assert found.blind is None
    assert found.error < 1e-5
    assert found.control > 1e-2


def test_turned_by_their_own_places_duplicates_are_not_lossless() -> None:
    """What the report says of rotary tables: without it the oracle above would prove too much."""
    model = build(Kind(position="rotary", readout="mean", start=0))
    x = duplicates(2)
    with torch.no_grad():
        merged = tomepass.apply(model, r=6, example_inputs=x)
        assert relative_error(merged(x), model(x)) > 1e-3
    (line,) = merged.report(x).streams[0].sides
    assert "tokens alike but for their places merge approximately" in line


@torch.no_grad()
@pytest.mark.parametrize("prop_attn", [True, False])
def test_an_attentive_pooler_reads_merged_tokens_by_their_sizes(
    prop_attn: bool, shared_models: Any
) -> None:
    """Blocks without rotation, then a learned query, behind an encoder with it."""
    name = "vjepa2_classifier"
    model, inputs = shared_models[name], make_inputs(name, batch=4)
    method = ToMe([9, 6, 4], prop_attn=prop_attn)
    ours = tomepass.apply(model, method, example_inputs=inputs)(**inputs).logits
    video = inputs["pixel_values_videos"]
    options: Any = {"match_dtype": torch.float32, "with_margin": True}
    expected = vjepa2_classifier_forward(model, video, [9, 6, 4], prop_attn, **options)
    clear = expected.margin > 1e-5  # elsewhere a rounding may decide who merges
    assert int(clear.sum()) >= 3
    assert relative_error(ours[clear], expected.output[clear]) < 1e-4
    assert relative_error(model(**inputs).logits[clear], expected.output[clear]) > 1e-2
