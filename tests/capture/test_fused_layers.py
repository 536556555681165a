"""Fused layers written out: what PyTorch computes in one operator, and merged all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from depth import at_hand
from encoders import exported
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from zoo import relative_error

import tomepass
from tomepass import ToMe, TomeBackend
from tomepass.capture.dynamo import capture_dynamo
from tomepass.capture.fused_layers import DECOMPOSITIONS, FUSED_LAYERS
from tomepass.reading.attention import find_attentions


class Plain(nn.Module):
    """Patches through an ``nn.TransformerEncoder``, mean-pooled."""

    def __init__(self, *, norm_first: bool = False, activation: Any = "relu") -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, 36, 16))
        layer = nn.TransformerEncoderLayer(
            16, 2, 32, batch_first=True, norm_first=norm_first, activation=activation
        )
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, pixels: Tensor, mask: Tensor | None = None) -> Any:
        x = self.patches(pixels).flatten(2).mT + self.positions
        return self.head(self.encoder(x, mask).mean(1))


def made(**choices: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Plain(**choices).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return model


PIXELS = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
FORMS: list[dict[str, Any]] = [{}, {"norm_first": True}, {"activation": "gelu"}]
every_form = pytest.mark.parametrize("choices", FORMS, ids=str)
one_form = pytest.mark.parametrize("choices", at_hand(FORMS, [{}], map(str, FORMS)))


@every_form
@torch.no_grad()
def test_the_written_out_layers_compute_what_the_fused_ones_do(choices: dict[str, Any]) -> None:
    model, operators = made(**choices), set()

    def backend(gm: Any, example: list[Any]) -> Any:
        captured = capture_dynamo(gm, example)
        operators.update(str(n.target) for n in captured.graph.nodes)
        assert len(find_attentions(captured.graph)[0]) == 3
        return captured.module.forward

    got = torch.compile(model, backend=backend)(PIXELS)
    assert not [name for name in operators if "encoder_layer" in name]
    assert relative_error(got, model(PIXELS)) < 1e-5


@one_form
@torch.no_grad()
def test_both_doors_merge_it_alike(choices: dict[str, Any]) -> None:
    model = made(**choices)
    ours = tomepass.apply(model, r=6, example_inputs=PIXELS)(PIXELS)
    backend = TomeBackend(ToMe(r=6), inner="eager")
    assert relative_error(torch.compile(model, backend=backend)(PIXELS), ours) < 1e-5
    assert relative_error(model(PIXELS), ours) > 1e-3
    report = tomepass.explain(model, r=6, example_inputs=PIXELS)
    assert [b.tokens_out for b in report.blocks] == [30, 24, 18]
    # Post-norm: tokens merge after the norm that ends the attention half.
    if not choices.get("norm_first"):
        assert all(b.merge_at.startswith("layer_norm") for b in report.blocks)


class Weighing(nn.Module):
    """A block around ``nn.MultiheadAttention``; asking for weights keeps it in one operator."""

    def __init__(self, *, need_weights: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, pixels: Tensor) -> Any:
        x = self.patches(pixels).flatten(2).mT
        update, weights = self.attention(x, x, x, need_weights=self.need_weights)
        return (x + update).mean(1), weights


@torch.no_grad()
def test_multi_head_attention_merges_and_returns_weights_of_the_original_tokens() -> None:
    method = ToMe(6, protected=())
    plain = Weighing(need_weights=False).eval()
    merged = torch.compile(plain, backend=TomeBackend(method, inner="eager"))(PIXELS)[0]
    ours = tomepass.apply(plain, method, example_inputs=PIXELS)(PIXELS)[0]
    assert relative_error(merged, ours) < 1e-5
    weighing = Weighing(need_weights=True).eval()
    ours = tomepass.apply(weighing, method, example_inputs=PIXELS)(PIXELS)
    theirs = torch.compile(weighing, backend=TomeBackend(method, inner="eager"))(PIXELS)
    for mine, other, whole in zip(ours, theirs, weighing(PIXELS), strict=True):
        assert mine.shape == whole.shape
        assert relative_error(other, mine) < 1e-5


def test_a_fused_layer_that_stays_fused_counts_as_an_attention_nobody_can_read() -> None:
    x, qkv = torch.randn(2, 36, 16), (torch.randn(48, 16), torch.randn(48))
    out = (torch.randn(16, 16), torch.randn(16))

    def attend(x: Tensor) -> Tensor:
        return torch._native_multi_head_attention(x, x, x, 16, 2, *qkv, *out, None, True)[0]

    graph = make_fx(attend, tracing_mode="real", decomposition_table=DECOMPOSITIONS)(x).graph
    attentions, unread = find_attentions(graph)
    assert not attentions
    assert [node.target for node in unread] == [FUSED_LAYERS[1]]


@pytest.mark.deep
def test_the_harness_passes_on_it() -> None:
    report = tomepass.check(made(), PIXELS, r=6, inner="eager")
    assert report.ok, str(report)


def test_gradients_flow_through_the_layers_as_exported() -> None:
    graph = exported(made(), {"pixels": PIXELS})
    assert len(find_attentions(graph.graph)[0]) == 3
