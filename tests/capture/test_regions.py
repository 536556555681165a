"""Parts of a forward that Dynamo sets apart, where the model is captured without Dynamo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from depth import at_hand
from encoders import Block, Encoder, make, pixels
from torch import Tensor, nn
from torch._higher_order_ops import while_loop

import tomepass
from tomepass.capture import regions


class Nested(Block):
    """Compiled once for all blocks; reads a number of its own."""

    gain = 1.0

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Plain(Block):
    gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


def test_blocks_compiled_once_are_merged_as_others_are() -> None:
    model, plain = make(blocks=[Nested] * 2), make(blocks=[Plain] * 2)
    merged = tomepass.apply(model, r=4, example_inputs=pixels())
    expected = tomepass.apply(plain, r=4, example_inputs=pixels())
    assert torch.equal(merged(pixels()), expected(pixels()))
    for got, wanted in zip(
        merged.report(pixels()).blocks, expected.report(pixels()).blocks, strict=True
    ):
        assert (got.tokens_out, got.source) == (wanted.tokens_out, wanted.source)
    # Its weights are read where they are, and what it reads is seen to change.
    for changed in (model, plain):
        with torch.no_grad():
            changed.blocks[0].attention.q.weight.mul_(2)
        changed.blocks[1].gain = 3.0
    assert torch.equal(merged(pixels()), expected(pixels()))


def test_outside_of_a_capture_regions_are_torchs_own() -> None:
    before = getattr(regions._HOME, regions._PLACEHOLDER)
    tomepass.apply(make(blocks=[Nested]), r=4, example_inputs=pixels())
    with pytest.raises(ValueError, match="stop"), regions.regions_in_place():
        raise ValueError("stop")
    assert getattr(regions._HOME, regions._PLACEHOLDER) is before


class Ends(Encoder):
    """Its head is followed by a step that Dynamo traces; the step reads attributes."""

    def __init__(self) -> None:
        super().__init__(depth=1)
        self.gain, self.scales = 2.0, [1.0, 2.0]
        self.more = nn.Linear(5, 5)

    def read(self, x: Tensor) -> Any:
        return self.step(super().read(x))

    def step(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def there(self, x: Tensor) -> Tensor:
        return self.more(x) * self.gain * self.scales[1]

    def back(self, x: Tensor) -> Tensor:
        return x + self.gain + self.scales[1]


class Lambdas(Ends):
    def step(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.there(x), lambda x: self.back(x), (x,))


class Methods(Ends):
    def step(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.there, self.back, (x,))


class Loop(Ends):
    def step(self, x: Tensor) -> Tensor:
        def once(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, self.there(self.back(x))

        return while_loop(lambda i, x: i < 2, once, (torch.tensor(0), x))[1]


class RegionInBranch(Ends):
    def step(self, x: Tensor) -> Tensor:
        inside = torch.compiler.nested_compile_region(lambda x: self.back(x))
        return torch.cond(x.sum() > 0, lambda x: inside(x) * 2, self.there, (x,))


class Region(Ends):
    def step(self, x: Tensor) -> Tensor:
        return torch.compiler.nested_compile_region(lambda x: self.there(self.back(x)))(x)


CHANGED = {"gain": 5.0, "scales": [1.0, 7.0], "there": lambda x: x * 3}
STEPS = [Lambdas, Loop, RegionInBranch, Methods, Region]


@torch.no_grad()
@pytest.mark.parametrize("cls", at_hand(STEPS, [Loop]))
def test_what_a_step_traced_by_dynamo_reads_is_seen_to_change(cls: type[Ends]) -> None:
    model = make(cls)
    merged = tomepass.apply(model, r=0, example_inputs=pixels())
    torch.testing.assert_close(merged(pixels()), model(pixels()))
    model.more.weight.mul_(2)
    torch.testing.assert_close(merged(pixels()), model(pixels()))
    assert len(merged._captures) == 1, "values are read as they are"
    for name in ("gain", "scales", "there"):
        setattr(model, name, CHANGED[name])
        torch.testing.assert_close(merged(pixels()), model(pixels()))
    assert len(merged._captures) == 4
