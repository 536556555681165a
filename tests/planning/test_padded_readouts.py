"""Padding that a readout counts, though attention does not."""

from __future__ import annotations

from typing import Any

import torch
from encoders import kinds, with_zero_positions
from torch import Tensor, nn
from zoo import make_inputs, make_model, relative_error

import tomepass


class Mean(nn.Module):
    """The mean over all tokens of a text model, padding too."""

    def __init__(self) -> None:
        super().__init__()
        self.text = with_zero_positions(make_model("bert_padded"))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Any = self.text(input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden.mean(1)


@torch.no_grad()
def test_a_mean_that_counts_padding_is_that_of_the_unmerged_tokens() -> None:
    model, inputs = Mean(), make_inputs("bert_padded", 3)
    padded = inputs["attention_mask"] == 0
    inputs["input_ids"] = torch.where(padded, 3, kinds(3, 24) * 7 + 5)  # padding is all alike
    merged = tomepass.apply(model, r=[3, 0, 2], example_inputs=inputs)
    assert any("counts padding" in found.reason for found in merged.report(inputs).unmerged)
    expected = model(**inputs)
    assert relative_error(merged(**inputs), expected) < 1e-4
    hidden = model.text(**inputs).last_hidden_state
    without = (hidden * ~padded[..., None]).sum(1) / (~padded).sum(1, keepdim=True)
    assert relative_error(without, expected) > 1e-2
