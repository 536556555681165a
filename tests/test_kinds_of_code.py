"""Ways to write a model that merge and stay lossless in both doors, with gradients and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from depth import in_turn
from encoders import (
    Attention,
    ByHand,
    Encoder,
    duplicates,
    make,
    near,
    pixels,
    with_zero_positions,
)
from torch import Tensor, nn
from zoo import relative_error

import tomepass
from tomepass import ToMe, TomeBackend, TomeError

COUNTS = [9, 7]


def compiled(model: nn.Module, method: ToMe) -> Any:
    return torch.compile(model, backend=TomeBackend(method, inner="eager"))


class Vector(Encoder):
    """A linear layer with a one-dimensional weight."""

    def __init__(self, **choices: Any) -> None:
        super().__init__(**choices)
        self.bins = nn.Parameter(torch.linspace(-1, 1, 5))

    def read(self, x: Tensor) -> Any:
        return F.linear(self.head(x[:, 0]).softmax(-1), self.bins), F.linear(
            self.head(x), self.bins
        )


class UnmergedBefore(Encoder):
    """Tokens are read as an image, and what comes of it is attended to once more."""

    def __init__(self, **choices: Any) -> None:
        super().__init__(**choices)
        self.mix, self.extra = nn.Conv2d(16, 16, 3, padding=1), Attention(16)

    def read(self, x: Tensor) -> Any:
        grid = self.mix(x[:, 1:].transpose(1, 2).unflatten(2, (6, 6)))
        return self.head(self.extra(grid.flatten(2).transpose(1, 2)).contiguous())


class Subtracted(Encoder):
    """Beside the images an input without a batch, which is as long as one."""

    def forward(self, pixels: Tensor, mean: Tensor) -> Any:
        return super().forward(pixels - mean[:, None, None])


class Indexed(Encoder):
    """A boolean mask says which tokens are returned."""

    def forward(self, pixels: Tensor, mask: Tensor) -> Any:
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final(x)[mask])


class Anew(Encoder):
    """Each attention makes its mask of what hides padding."""

    def forward(self, pixels: Tensor, keep: Tensor) -> Any:
        x = self.embed(pixels)
        for block in self.blocks:
            q, k, v = block.attention.heads(block.norm1(x))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
            x = x + block.attention.out(y.transpose(1, 2).reshape(x.shape))
            x = x + block.mlp(block.norm2(x))
        return self.head(self.final(x)[:, 0])


MASK = torch.rand(3, 37, generator=torch.Generator().manual_seed(0)) > 0.4
KINDS: dict[type[Encoder], tuple[Tensor, ...]] = {
    Vector: (),
    UnmergedBefore: (),
    Subtracted: (torch.tensor([0.1, -0.2, 0.3]),),
    Indexed: (MASK,),
    Anew: ((torch.arange(37) < 31).expand(3, -1),),
}


@pytest.mark.parametrize(("kind", "grad"), in_turn(KINDS, (False, True)))
def test_it_is_merged_and_lossless_in_both_doors(kind: type[Encoder], grad: bool) -> None:
    model, inputs = with_zero_positions(make(kind)), (duplicates(3), *KINDS[kind])
    with torch.set_grad_enabled(grad):
        expected = model(*inputs)
        merged: Any = tomepass.apply(model, r=COUNTS, example_inputs=inputs)
        for made in (merged, compiled(model, ToMe(COUNTS))):
            found = made(*inputs)
            pairs = zip(found, expected, strict=True) if kind is Vector else [(found, expected)]
            for ours, theirs in pairs:
                assert ours.requires_grad is grad
                assert relative_error(ours, theirs) < 1e-4


@torch.no_grad()
def test_an_input_without_a_batch_is_the_same_for_any_batch() -> None:
    model, mean = make(Subtracted), torch.tensor([0.1, -0.2, 0.3])
    merged: Any = tomepass.apply(model, r=4, example_inputs=(pixels(2), mean))
    through = compiled(model, ToMe(4))
    x = pixels(4)
    alone = torch.cat([merged(image[None], mean) for image in x])
    for batch in (2, 3, 4):  # 3 is how long the mean is
        for made in (merged, through):
            torch.testing.assert_close(made(x[:batch], mean), alone[:batch], rtol=1e-4, atol=1e-5)


def near_by(q: Tensor) -> Tensor:
    place = torch.arange(q.shape[2])
    return ((place[:, None] - place).abs() <= 4).float()


class Weights(ByHand):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-1, -2) * 0.4).softmax(-1) * near_by(q)
        return weights / weights.sum(-1, keepdim=True) @ v


class Scores(ByHand):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * near_by(q)).softmax(-1) @ v


class Lowered(ByHand):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = (1 - near_by(q)) * -100.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=hidden)


@pytest.mark.parametrize("attention", [Weights, Scores, Lowered])
@torch.no_grad()
def test_local_attention_is_refused_by_the_backend_however_it_is_written(
    attention: type[Attention],
) -> None:
    model, x = make(blocks=[near(attention)] * 2), duplicates(2)
    with pytest.raises(Exception, match="not provably all true") as caught:
        compiled(model, ToMe(4))(x)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), TomeError)
