"""Sizes that data decide: behind the merges they are what they were, before them they are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from encoders import Encoder, duplicates, make, with_zero_positions
from torch import Tensor, nn
from zoo import relative_error

import tomepass
from tomepass import TomeError

READ: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "indexed": lambda x, mask: x[mask],
    "indexed, and reshaped": lambda x, mask: x[mask].reshape(-1, 4) * 2,
    "selected": lambda x, mask: x.masked_select(mask[..., None]),
    "places": lambda x, mask: (x[:, 0], mask.nonzero()),
    "indexed by places": lambda x, mask: x.flatten(0, 1)[mask.flatten().nonzero()[:, 0]],
    "a loss over some": lambda x, mask: (x[mask] - mask.float()[mask][:, None]).pow(2).mean(),
    "two of one mask": lambda x, mask: torch.cat([x[mask], 2 * x[mask]], -1),
    "two masks": lambda x, mask: (x[mask], x[~mask]),
    "unique": lambda x, mask: x[:, 0] + mask.long().sum(1).unique().sum(),
}


class Masked(Encoder):
    reader = "indexed"

    def forward(self, pixels: Tensor, mask: Tensor) -> Any:
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return READ[self.reader](self.final(x), mask)


@torch.no_grad()
@pytest.mark.parametrize("reader", READ)
def test_a_result_whose_size_data_decide(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Masked, "reader", reader)
    model, x = with_zero_positions(make(Masked)), duplicates(3)
    mask = torch.rand(3, 37, generator=torch.Generator().manual_seed(0)) > 0.4
    inputs = {"pixels": x, "mask": mask}
    merged = tomepass.apply(model, r=[9, 7], example_inputs=inputs)
    for given in (mask, ~mask):
        ours, theirs = merged(x, given), model(x, given)
        pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
        for one, other in pairs:
            assert one.shape == other.shape
            assert relative_error(one, other) < 1e-4


class Packed(nn.Module):
    """Attention among so many tokens as the data say."""

    residual = False

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        t = x[keep]
        torch._check(t.shape[0] >= 2)
        y = (self.proj(t) @ t.T).softmax(-1) @ t
        return (t + y if self.residual else y).sum() + x.sum()


@pytest.mark.parametrize("residual", [False, True])
def test_attention_among_as_many_as_data_say_is_refused(
    residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Packed, "residual", residual)
    inputs = {"x": torch.randn(9, 8), "keep": torch.arange(9) > 3}
    report = tomepass.explain(Packed().eval(), r=1, example_inputs=inputs)
    assert not report.ok
    assert "only known when the model runs" in report.refused[0].reason or not residual
    assert report.macs == report.macs_original
    with pytest.raises(TomeError):
        tomepass.apply(Packed().eval(), r=1, example_inputs=inputs)
