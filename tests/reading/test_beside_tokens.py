"""What lies beside the tokens, and none of it zero: merged models against a plain reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import Encoder, make, pixels
from module_names import Attention, blocks_of, mlp_of
from reference_models import weighted_mean
from torch import Tensor
from torch.overrides import TorchFunctionMode
from zoo import make_inputs, make_model, relative_error

import tomepass
from tomepass import ToMe, reference

R = [9, 14, 8]


class Biases(TorchFunctionMode):
    """Keeps what a model adds to the scores of each of its attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.seen.append(kwargs.get("attn_mask", args[3] if len(args) > 3 else None))
        return function(*args, **kwargs)


def plain(model: Any, images: Tensor, prop_attn: bool = True) -> tuple[Tensor, Tensor]:
    """The logits ``[B, classes]`` of BEiT and Data2Vec written out, and each image's margin."""
    base = getattr(model, "beit", None) or model.data2vec_vision
    with Biases() as biases:
        model(images)
    embedded = base.embeddings(images)
    x = embedded[0] if isinstance(embedded, tuple) else embedded
    batch, tokens, _ = x.shape
    size, source = torch.ones(batch, tokens), torch.arange(tokens).repeat(batch, 1)
    margin = torch.full((batch,), float("inf"), dtype=torch.float64)
    for block, bias, r in zip(blocks_of(base), biases.seen, R, strict=True):
        a = attention(block)
        y = block.layernorm_before(x)
        q, k, v = (
            part(y).unflatten(2, (-1, a.head_dim)).transpose(1, 2)
            for part in (a.query, a.key, a.value)
        )
        scores = q @ k.mT * a.scale + reference.merged_bias(bias, source, x.shape[1])
        weights = reference.proportional_weights(scores, size if prop_attn else None)
        x = x + block.lambda_1 * a.out((weights.to(v) @ v).transpose(1, 2).flatten(2))
        margin = torch.minimum(margin, reference.match_margin(k, r, (0,)))
        assign = reference.match(k, r, (0,))
        x, size = reference.merge(x, size, assign, x.shape[1] - r)
        source = reference.compose(assign, source)
        x = x + block.lambda_2 * mlp_of(block)(block.layernorm_after(x))
    pooled = base.pooler.layernorm(weighted_mean(x[:, 1:], size[:, 1:]))
    return model.classifier(pooled), margin


def attention(block: Any) -> Attention:
    """Its projections by whichever names transformers gives."""
    a = block.attention
    inner, out = (a, a.o_proj) if hasattr(a, "q_proj") else (a.attention, a.output.dense)
    names = ("q_proj", "k_proj", "v_proj") if inner is a else ("query", "key", "value")
    head_dim = a.head_dim if inner is a else inner.attention_head_size
    return Attention(*(getattr(inner, name) for name in names), out, head_dim, head_dim**-0.5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "prop_attn", "written"),
    [
        ("beit", True, "sdpa"),
        ("beit", False, "eager"),
        ("beit_shared", True, "eager"),
        ("data2vec_vision", True, "sdpa"),
    ],
)
def test_biases_are_a_plain_reference_s(name: str, prop_attn: bool, written: str) -> None:
    model, images = make_model(name), make_inputs(name, batch=4)["pixel_values"]
    expected, margin = plain(model, images, prop_attn)
    clear = margin > 1e-5
    assert int(clear.sum()) >= 3
    model.set_attn_implementation(written)
    method = ToMe(R, prop_attn=prop_attn)
    merged = tomepass.apply(model, method, example_inputs={"pixel_values": images})
    assert relative_error(merged(images).logits[clear], expected[clear]) < 1e-4
    assert relative_error(model(images).logits, expected) > 1e-3


class Again(Encoder):
    """Positions are added to the tokens before each block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x + self.positions)
        return self.read(self.final(x))


@torch.no_grad()
def test_positions_added_again_are_a_plain_reference_s() -> None:
    model, x, counts = make(Again, depth=3), pixels(4), [9, 7, 5]
    merged = tomepass.apply(model, r=counts, example_inputs=x)
    expected, margin = again(model, x, counts)
    clear = margin > 1e-5
    assert int(clear.sum()) >= 3
    assert relative_error(merged(x)[clear], expected[clear]) < 1e-4
    assert relative_error(model(x), expected) > 1e-3


def again(model: Any, images: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """The same written out, with the mean of the rows of merged tokens."""
    x = model.embed(images)
    batch, tokens, _ = x.shape
    size, source = torch.ones(batch, tokens), torch.arange(tokens).repeat(batch, 1)
    margin = torch.full((batch,), float("inf"), dtype=torch.float64)
    for block, r in zip(model.blocks, counts, strict=True):
        x = x + reference.merged_rows(model.positions, source, x.shape[1])
        q, k, v = block.attention.heads(block.norm1(x))
        seen = reference.proportional_attention(q, k, v, size)
        x = x + block.attention.out(seen.transpose(1, 2).flatten(2))
        margin = torch.minimum(margin, reference.match_margin(k, r, (0,)))
        assign = reference.match(k, r, (0,))
        x, size = reference.merge(x, size, assign, x.shape[1] - r)
        source = reference.compose(assign, source)
        x = x + block.mlp(block.norm2(x))
    return model.read(model.final(x)), margin
