"""Blocks and streams, found by dataflow: what must match, what must not, and why not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from depth import at_hand
from encoders import (
    Attention,
    Block,
    Causal,
    DecomposedBias,
    Encoder,
    Windows,
    compiled,
    exported,
    make,
    near,
    pixels,
    report_on,
)
from near_misses import AttentionTwice
from torch import Tensor, nn
from zoo import make_inputs

import tomepass
from tomepass import ToMe, TomeError
from tomepass.planning.plan_graph import plan_graph
from tomepass.reading.structure import find_structure
from tomepass.rewriting.sweep import rewrite


@pytest.mark.parametrize("door", [exported, compiled], ids=["export", "dynamo"])
def test_the_cap_halves_what_is_not_protected(shared_models: Any, door: Callable[..., Any]) -> None:
    graph = door(shared_models["deit_distilled"], make_inputs("deit_distilled"))
    report = report_on(graph, ToMe(1000))
    assert [b.tokens_out for b in report.blocks] == [34, 18, 10]


def test_a_classifier_reads_the_same_at_another_batch_and_resolution(shared_models: Any) -> None:
    wide = {"pixel_values": torch.randn(5, 3, 48, 32), "interpolate_pos_encoding": True}
    (stream,) = report_on(exported(shared_models["vit"], wide), ToMe(5)).streams
    assert stream.tokens == 1 + 12 * 8
    assert stream.protected == (0,)


# ---- what must match -------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "post-norm": {"norm": "post"},
    "MLP beside the attention": {"norm": "parallel"},
    "LayerScale": {"layer_scale": True},
    "DropPath": {"drop_path": True},
    "swapped sum": {"swapped": True},
    "fused projection": {"qkv": "fused"},
    "chunked projection": {"qkv": "chunk"},
    "everything": {"layer_scale": True, "drop_path": True, "swapped": True, "qkv": "fused"},
    "one block": {"depth": 1},
    "one block, post-norm": {"depth": 1, "norm": "post"},
    "one block, MLP beside": {"depth": 1, "norm": "parallel"},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_block_matches_in_every_form(form: str) -> None:
    choices = FORMS[form]
    depth = choices.get("depth", 2)
    report = report_on(exported(make(**choices), {"pixels": pixels()}), ToMe(4))
    assert not report.refused
    assert [b.tokens_in for b in report.blocks] == [37 - 4 * i for i in range(depth)]


def test_tokens_merge_after_what_ends_the_attention_half() -> None:
    def merge_points(**choices: Any) -> list[str]:
        graph = exported(make(**choices), {"pixels": pixels()})
        nodes = {n.name: n for n in graph.graph.nodes}
        report = report_on(graph, ToMe(4))
        return [str(nodes[b.merge_at].target).split(".")[1] for b in report.blocks]

    def first_mlp_input(**choices: Any) -> str:
        graph = exported(make(**choices), {"pixels": pixels()})
        block = find_structure(graph).streams[0].blocks[0]
        readers = {str(u.target) for u in block.merge_at.users}
        return "norm" if "aten.layer_norm.default" in readers else "linear"

    assert merge_points() == ["add", "add"]
    assert first_mlp_input() == "norm"
    assert merge_points(norm="post") == ["layer_norm", "layer_norm"]
    assert first_mlp_input(norm="post") == "linear"
    # Beside the attention there is no half: the sum of all three ends the block.
    assert merge_points(norm="parallel") == ["add", "add"]
    graph = exported(make(norm="parallel"), {"pixels": pixels()})
    for block in find_structure(graph).streams[0].blocks:
        assert block.merge_at is not block.join


class MlpFirst(Block):
    """``x + mlp(n) + attention(n)``: the sum next to the attention adds another sum."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        return x + self.mlp(y) + self.attention(y)


class BothFirst(Block):
    """``x + (mlp(n) + attention(n))``: the first sum after the attention is not the residual."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        return x + (self.mlp(y) + self.attention(y))


class InPlace(Block):
    """Residual sums in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.attention(self.norm1(x))
        x += self.mlp(self.norm2(x))
        return x


class AttentionOnly(Block):
    """No MLP at all."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm1(x))


@pytest.mark.parametrize("form", [MlpFirst, BothFirst, InPlace, AttentionOnly])
def test_the_residual_is_found_wherever_the_sum_stands(form: type[Block]) -> None:
    report = report_on(exported(make(blocks=[form, form]), {"pixels": pixels()}), ToMe(4))
    assert not report.refused
    assert [b.tokens_out for b in report.blocks] == [33, 29]


def test_a_readout_that_fans_out_is_no_part_of_the_last_block() -> None:
    class TwoHeads(Encoder):
        def read(self, x: Tensor) -> Any:
            token = x[:, 0]
            return token, self.head(token)

    graph = exported(make(TwoHeads, blocks=[AttentionOnly] * 2), {"pixels": pixels()})
    report = report_on(graph, ToMe(4))
    assert not report.refused
    last = report.blocks[-1]
    assert last.merge_at == last.join


def test_two_towers_are_two_streams() -> None:
    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Encoder(depth=2), Encoder(depth=3, start=0, readout="mean")

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            # Block by block, turn about: their nodes are interleaved in the graph.
            x, y = self.one.embed(left), self.other.embed(right)
            for i in range(3):
                x = self.one.blocks[i](x) if i < 2 else x
                y = self.other.blocks[i](y)
            one, other = self.one.read(self.one.final(x)), self.other.read(self.other.final(y))
            return one @ other.T

    report = report_on(exported(make(TwoTowers), {"left": pixels(), "right": pixels()}), ToMe(4))
    assert not report.refused
    assert [(s.tokens, s.protected, len(s.blocks)) for s in report.streams] == [
        (37, (0,), 2),
        (36, (), 3),
    ]


@pytest.mark.deep
def test_reading_and_rewriting_48_blocks_costs_no_more_than_linear_time() -> None:
    def seconds(depth: int) -> float:
        graph = exported(make(depth=depth), {"pixels": pixels()})
        took = []
        for _ in range(3):
            start = time.process_time()
            planned = plan_graph(graph, ToMe([1] * 6))
            rewrite(graph, planned)
            took.append(time.process_time() - start)
        assert len(planned.streams[0].stream.blocks) == depth
        return min(took)

    assert seconds(48) < 5.5 * seconds(12)


# ---- what must not match ---------------------------------------------------------------------


class OtherValue(Block):
    """The sum adds something else than what the attention was computed from."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = self.mlp(y) + self.attention(y)
        return x + self.mlp(self.norm2(x))


class NoResidual(Block):
    """An attention without a residual."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CausalMask(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class BufferedMask(Attention):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("hidden", torch.full((37, 37), -torch.inf).triu(1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.hidden)


class WrittenMask(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.zeros(q.shape[2], q.shape[2])
        mask[5, 7] = -torch.inf
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Linear(Attention):
    """No softmax, so every token weighs what its key says."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)


class SmoothedWeights(Attention):
    """Every key gets a little weight whatever its score."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-1, -2)).softmax(-1) + 0.01) @ v


class DataMask(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = (k.mean((1, 3)) > 0)[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class MixedHeads(Attention):
    """Scores of heads are mixed by a product: its right factor is no key."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.mixing = nn.Parameter(torch.eye(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhnm,gh->bgnm", q @ k.transpose(-1, -2), self.mixing)
        return scores.softmax(-1) @ v


class OnlyPatches(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], super().forward(x[:, 1:])], dim=1)


NEAR_MISSES = {
    AttentionTwice: ("no residual sum follows this attention", "scaled_dot_product_attention"),
    OtherValue: ("this sum adds another value", "add"),
    NoResidual: ("no residual sum follows this attention", "scaled_dot_product_attention"),
    Causal: ("causal attention", "scaled_dot_product_attention"),
    CausalMask: ("mask tril is not provably all true", "scaled_dot_product_attention"),
    BufferedMask: ("is not provably all true", "scaled_dot_product_attention"),
    WrittenMask: ("is not provably all true", "scaled_dot_product_attention"),
    DecomposedBias: ("more than one product", "softmax"),
    SmoothedWeights: ("changes what attention weights sum to", "add"),
    DataMask: ("is not provably all true", "scaled_dot_product_attention"),
    MixedHeads: ("expected keys made from the stream's tokens", "matmul"),
    Windows: ("windowed or hierarchical", "reshape"),
    OnlyPatches: ("some of the", "scaled_dot_product_attention"),
}


def refusal(model: nn.Module, r: int = 4) -> TomeError:
    """The error that merging a hand-written encoder raises."""
    with pytest.raises(TomeError) as caught:
        tomepass.apply(model, r=r, example_inputs=pixels())
    return caught.value


@pytest.mark.parametrize("cls", NEAR_MISSES)
def test_a_near_miss_is_refused_with_block_node_line_and_reason(cls: type[Any]) -> None:
    reason, node = NEAR_MISSES[cls]
    start = 0 if cls is Windows else 1
    error = refusal(make(blocks=[near(cls), near(cls)], start=start, readout="mean"))
    assert error.block == 0
    assert reason in error.reason
    assert str(error.node).startswith(node)
    assert "/test_structure.py:" in str(error.source) or "/encoders.py:" in str(error.source)


@pytest.mark.parametrize("cls", at_hand(NEAR_MISSES, [DataMask, *[*NEAR_MISSES][::4]]))
def test_a_near_miss_inside_a_stream_leaves_the_whole_stream_alone(cls: type[Any]) -> None:
    start = 0 if cls is Windows else 1
    model = make(blocks=[Block, near(cls), Block], start=start, readout="mean")
    report = tomepass.explain(model, r=4, example_inputs=pixels())
    assert not report.ok
    assert not report.streams
    error = report.refusal()
    assert NEAR_MISSES[cls][0] in error.reason
    assert error.block == 1


def test_attention_without_a_softmax_over_keys_is_none() -> None:
    assert "no attention" in refusal(make(blocks=[near(Linear)])).reason


def test_a_graph_without_attention_says_so() -> None:
    error = refusal(make(blocks=[]))
    assert "no attention" in error.reason


def test_an_attention_that_does_not_read_the_input_is_no_block() -> None:
    class Constant(Encoder):
        def forward(self, pixels: Tensor) -> Tensor:
            x = self.positions
            for block in self.blocks:
                x = block(x)
            return self.read(x).expand(pixels.shape[0], -1) + pixels.mean()

    assert "does not read the model's input" in refusal(make(Constant)).reason
