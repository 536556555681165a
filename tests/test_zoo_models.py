"""The zoo's models are no empty ones: what is zero in a fresh model counts in theirs."""

from __future__ import annotations

import pytest
import torch
from depth import at_hand
from zoo import FAMILIES, make_inputs, make_model, output_of, relative_error

import tomepass


@torch.no_grad()
@pytest.mark.parametrize("name", at_hand(FAMILIES, [*FAMILIES][::2]))
def test_what_is_zero_in_a_fresh_model_moves_the_output(name: str) -> None:
    fresh = FAMILIES[name].make()
    # Tokens that stand for hidden patches are not read where none is hidden.
    zero = [
        key
        for key, parameter in fresh.named_parameters()
        if parameter.ndim > 1 and not parameter.any() and "mask_token" not in key
    ]
    if not zero:
        return
    model, inputs = make_model(name), make_inputs(name)
    expected = output_of(name, model(**inputs))
    for key in zero:
        parameter = model.get_parameter(key)
        kept = parameter.clone()
        parameter.zero_()
        moved = relative_error(output_of(name, model(**inputs)), expected)
        parameter.copy_(kept)
        assert moved > 2e-3, key


@pytest.mark.parametrize("name", at_hand(FAMILIES, [*FAMILIES][1::2]))
def test_no_matrix_or_table_of_a_model_is_constant(name: str) -> None:
    for key, parameter in make_model(name).named_parameters():
        if parameter.numel() > 1:
            assert parameter.min() < parameter.max(), key


def test_text_beside_images_is_left_alone() -> None:
    inputs = make_inputs("siglip")
    report = tomepass.explain(make_model("siglip"), r=4, example_inputs=inputs)
    assert len(report.streams) == 1
    assert any("looked up by ids" in refused.reason for refused in report.refused)
