"""How tokens become one, through several merges: against a plain reference."""

from __future__ import annotations

import pytest
import torch
from encoders import make, pixels
from zoo import relative_error

import tomepass
from tomepass import ToMe, reference

R = [9, 7, 5]


@torch.no_grad()
@pytest.mark.parametrize("combine", ["mean", "max"])
def test_tokens_are_combined_as_the_plain_reference_does(combine: str) -> None:
    model, images = make(depth=3, readout="class"), pixels(4)
    merged = tomepass.apply(model, ToMe(R, combine=combine), example_inputs=images)
    x = model.embed(images)
    batch, tokens, _ = x.shape
    size = torch.ones(batch, tokens)
    margin = torch.full((batch,), float("inf"), dtype=torch.float64)
    for block, r in zip(model.blocks, R, strict=True):
        q, k, v = block.attention.heads(block.norm1(x))
        seen = reference.proportional_attention(q, k, v, size)
        x = x + block.attention.out(seen.transpose(1, 2).flatten(2))
        margin = torch.minimum(margin, reference.match_margin(k, r, (0,)))
        assign, left = reference.match(k, r, (0,)), x.shape[1] - r
        _, summed = reference.merge(x, size, assign, left)
        x, size = reference.combine(x, size, assign, left, combine), summed
        x = x + block.mlp(block.norm2(x))
    expected, clear = model.read(model.final(x)), margin > 1e-5
    assert int(clear.sum()) >= 3
    assert relative_error(merged(images)[clear], expected[clear]) < 1e-4
