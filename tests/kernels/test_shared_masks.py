"""A padding mask that all images share says the same of each: eager, and with the CPU's kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor.compile_fx
import torch.nn.functional as F
from encoders import Attention, Encoder, make, pixels
from torch import Tensor, fx, nn

import tomepass
from tomepass import ToMe, TomeBackend
from tomepass.kernels.cpu import match_cpu, merge_cpu, pad_keys_cpu
from tomepass.ops.padding import PADDED, padded_size

TOKENS, SEEN, IMAGES = 37, 30, 4


class Masked(Attention):
    """Attention that leaves out the keys that a mask hides."""

    mask: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


class Padded(Encoder):
    """An encoder whose mask comes with the pixels, ``[1, N]`` or ``[B, N]``."""

    def forward(self, pixels: Tensor, keep: Tensor) -> Any:
        mask = keep[:, None, None]
        for block in self.blocks:
            block.attention.__dict__["mask"] = mask
        return super().forward(pixels)


def keep(images: int) -> Tensor:
    return (torch.arange(TOKENS) < SEEN).expand(images, -1)


def padded() -> nn.Module:
    model = make(Padded, depth=2, readout="class")
    for block in model.blocks:
        block.attention.__class__ = Masked
    return model


def test_one_mask_for_all_images_is_one_for_each(handed: list[fx.GraphModule]) -> None:
    model, x = padded(), pixels(IMAGES)
    with torch.no_grad():
        merged = tomepass.apply(model, r=[8, 6], example_inputs=(x, keep(1)))
        expected = merged(x, keep(IMAGES).contiguous())
        assert torch.equal(merged(x, keep(1)), expected)
        got = torch.compile(model, backend=TomeBackend(ToMe([8, 6])))(x, keep(1))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    (graph,) = handed
    for kernel in (match_cpu, merge_cpu):
        assert len(graph.graph.find_nodes(op="call_function", target=kernel)) == 2


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 9), (1, 1, 9, 9), (3, 1, 1, 9), (3, 2, 9, 9), (1, 9, 9), (9, 9), (1, 9), (9,)],
    ids=str,
)
def test_sizes_are_each_image_s_own_whatever_the_rank_of_the_mask(shape: tuple[int, ...]) -> None:
    seen = torch.arange(9) < torch.tensor([9, 6, 4] if shape[0] == 3 else [6])[:, None]
    mask = seen.view(-1, *[1] * (len(shape) - 2), 9) if len(shape) > 1 else seen[0]
    size = padded_size(mask.expand(shape), torch.empty(3, 9, 5))
    assert size.shape == (3, 9)
    assert torch.equal(size >= PADDED, seen.expand(3, -1))
    assert torch.equal(size == 1, seen.expand(3, -1))


@pytest.mark.parametrize("shape", [(2, 1, 1, 9), (1, 1, 1, 8), (1, 1, 1, 1, 9)])
def test_a_mask_of_other_tokens_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a mask that broadcasts to \[3, H, 9, 9\]"):
        padded_size(torch.ones(shape, dtype=torch.bool), torch.empty(3, 9, 5))


class Wide(Attention):
    """Attention with values twice as wide as keys."""

    def __init__(self, width: int, *args: Any) -> None:
        super().__init__(width, *args)
        self.values, self.back = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, _ = self.heads(x)
        v = self.values(x).view(*x.shape[:2], 2, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.back(y.transpose(1, 2).reshape(*x.shape[:2], -1))


def test_padded_keys_may_have_wider_values(
    handed: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    model, x = make(depth=2), pixels(2).bfloat16()
    for block in model.blocks:
        torch.manual_seed(0)
        block.attention = Wide(model.blocks[0].attention.out.in_features)
    model = model.bfloat16().eval()
    with torch.no_grad():
        expected = tomepass.apply(model, r=[3, 2], example_inputs=x)(x)
        got = torch.compile(model, backend=TomeBackend(ToMe([3, 2])))(x)
    (graph,) = handed
    assert len(graph.graph.find_nodes(op="call_function", target=pad_keys_cpu)) == 1
    torch.testing.assert_close(got, expected, rtol=0, atol=2**-6 * float(expected.abs().max()))
