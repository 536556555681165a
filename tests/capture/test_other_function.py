"""Encoders that go another way while they are captured, as transformers' masks do.

A mask that hides nothing is left out where its values can be read, and made where they cannot:
while the model is followed. What attends without a mask by another rule than with one (PaliGemma,
whose prefix sees all; the vision tower of Phi-4, which its flag calls causal) is two functions,
and the graph is not the model's.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoders import Attention, Encoder, make, pixels
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from zoo import relative_error

import tomepass
from tomepass import TomeError


def followed(x: Tensor) -> bool:
    """Has the tensor no values to read, as transformers' ``is_tracing`` asks?"""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


class Masked(Attention):
    """Makes a mask of all tokens; ``shortcut``: the rule where it is found to hide nothing."""

    shortcut = "all"

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        real = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool)
        if not followed(real) and bool(real.all()):
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.shortcut == "causal")
        mask = real[:, None, None, :].expand(-1, 1, k.shape[2], -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.made(mask))

    def made(self, mask: Tensor) -> Tensor:
        return mask


class CausalWithoutMask(Masked):
    """Phi-4's: its flag says causal, which counts where no mask is given alone."""

    shortcut = "causal"


class CausalWithMask(Masked):
    """PaliGemma's: sees all where no mask is given; the mask that is made is causal."""

    def made(self, mask: Tensor) -> Tensor:
        return mask & torch.ones(mask.shape[-2:], dtype=torch.bool).tril()


class Elsewhere(Attention):
    """Scales its scores by another number while it is followed."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = 1.0 if followed(q) else q.shape[-1] ** -0.5
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


def encoder(attention: type[Attention], blocks: int = 2) -> nn.Module:
    model = make(Encoder, depth=blocks, readout="mean")
    for block in model.blocks:
        turned = attention(16)
        turned.load_state_dict(block.attention.state_dict())
        block.attention = turned
    return model.eval()


OTHERS = [CausalWithoutMask, CausalWithMask, Elsewhere]


@torch.no_grad()
@pytest.mark.parametrize("attention", OTHERS)
def test_the_graph_of_another_function_is_refused(attention: type[Attention]) -> None:
    model, x = encoder(attention), pixels(3)
    expected = model(x)
    with pytest.raises(TomeError, match="is another function"):
        tomepass.apply(model, r=0, example_inputs=x)
    with pytest.raises(TomeError, match="is another function"):
        tomepass.apply(model, r=6)(x)
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_left_unmerged_it_is_the_model() -> None:
    model, x = encoder(CausalWithoutMask), pixels(3)
    merged = tomepass.apply(model, r=6, on_unmatched="warn")
    with pytest.warns(UserWarning, match="is another function"):
        got = merged(x)
    assert torch.equal(got, model(x))


@torch.no_grad()
def test_another_way_to_the_same_result_is_merged() -> None:
    model, plain, x = encoder(Masked, 1), encoder(Attention, 1), pixels(3)
    merged: Any = tomepass.apply(model, r=6, example_inputs=x)
    assert merged.report(x).blocks[0].r == 6
    expected = tomepass.apply(plain, r=6, example_inputs=x)(x)
    assert relative_error(merged(x), expected) < 1e-5
    assert relative_error(merged(x), model(x)) > 1e-3
