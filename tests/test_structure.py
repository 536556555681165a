"""Blocks and streams, found by dataflow: what must match, what must not, and why not."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
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
from torch import Tensor, nn
from zoo import BLOCKS, make_inputs, scaled_up

import tomepass
from tomepass import ToMe, TomeError
from tomepass.planning import plan_graph
from tomepass.rewrite import rewrite
from tomepass.structure import Mismatch, find_structure

# ---- the families, exactly -------------------------------------------------------------------


class Expected(NamedTuple):
    """What one family must read as, whichever door it comes through."""

    tokens: int
    protected: tuple[int, ...]
    readout: tuple[str, ...]


CLASS = "reads tokens [0]"
DISTILLED = "reads tokens [1]"
MEAN = "mean over tokens, weighted by size"
SEQUENCE = "returned unmerged from 51 to 65 tokens"

EXPECTED = {
    "vit": Expected(65, (0,), (CLASS,)),
    "deit": Expected(66, (0, 1), (CLASS,)),
    "deit_distilled": Expected(66, (0, 1), (CLASS, DISTILLED)),
    "dinov2": Expected(65, (0,), (CLASS, MEAN)),
    "dinov2_registers": Expected(69, (0, 1, 2, 3, 4), (CLASS, MEAN)),
    "clip_vision": Expected(65, (0,), (CLASS, SEQUENCE)),
    "clip_vision_projection": Expected(65, (0,), (CLASS, SEQUENCE)),
    "vit_msn": Expected(65, (0,), (CLASS,)),
    "ijepa": Expected(64, (), (MEAN,)),
    "ast": Expected(66, (0, 1), (CLASS, DISTILLED)),
}


@pytest.mark.parametrize("door", [exported, compiled], ids=["export", "dynamo"])
def test_every_family_reads_exactly(
    family: str, shared_models: Any, door: Callable[..., Any]
) -> None:
    expected = EXPECTED[family]
    graph = door(shared_models[family], make_inputs(family))
    report = report_on(graph, ToMe([5, 0, 9]))
    assert not report.refused
    assert not report.unmerged
    (stream,) = report.streams
    assert stream.tokens == expected.tokens
    assert stream.protected == expected.protected
    assert [b.index for b in stream.blocks] == list(range(BLOCKS))
    assert [b.r for b in stream.blocks] == [5, 0, 9]
    n = expected.tokens
    assert [b.tokens_out for b in stream.blocks] == [n - 5, n - 5, n - 14]
    assert tuple(line.split(": ")[1] for line in stream.readout) == expected.readout


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


class Twice(Block):
    """The attention's output is used again, behind the residual sum."""

    def forward(self, x: Tensor) -> Tensor:
        update = self.attention(self.norm1(x))
        x = x + update
        return x + self.mlp(self.norm2(x)) + update


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
    Twice: ("no residual sum follows this attention", "scaled_dot_product_attention"),
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


@pytest.mark.parametrize("cls", NEAR_MISSES)
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


# ---- transformers models outside this list ---------------------------------------------------

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 4}
WIDE: dict[str, Any] = {**SMALL, **IMAGE, "intermediate_size": 64}
STAGES: dict[str, Any] = {"depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
TOKENS: dict[str, Any] = {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1}


def swin() -> nn.Module:
    return hf.SwinModel(hf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, **STAGES))


def sam() -> nn.Module:
    config = hf.SamVisionConfig(
        **SMALL, **IMAGE, output_channels=16, mlp_dim=64, window_size=4, global_attn_indexes=[1]
    )
    return hf.SamVisionModel(config)


def vitdet() -> nn.Module:
    config = hf.VitDetConfig(**SMALL, **IMAGE, window_block_indices=[0], window_size=4)
    return hf.VitDetModel(config)


def hiera() -> nn.Module:
    config = hf.HieraConfig(
        image_size=[32, 32],
        embed_dim=16,
        depths=[1, 1],
        num_heads=[1, 2],
        num_query_pool=1,
        patch_stride=[4, 4],
        masked_unit_size=[4, 4],
    )
    return hf.HieraModel(config)


def gpt2() -> nn.Module:
    config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, use_cache=False, **TOKENS)
    return hf.GPT2Model(config)


def bert() -> nn.Module:
    return hf.BertModel(hf.BertConfig(**SMALL, intermediate_size=64, vocab_size=99))


def images() -> dict[str, Tensor]:
    return make_inputs("vit")


def words() -> dict[str, Tensor]:
    return {
        "input_ids": torch.arange(32).view(2, 16),
        "attention_mask": torch.ones(2, 16, dtype=torch.long),
    }


REFUSED: dict[Callable[[], nn.Module], tuple[Callable[[], Any], str, str]] = {
    swin: (images, "windowed or hierarchical", "modeling_swin.py"),
    sam: (images, "windowed or hierarchical", "modeling_sam.py"),
    vitdet: (images, "windowed or hierarchical", "modeling_vitdet.py"),
    hiera: (images, "windowed or hierarchical", "modeling_hiera.py"),
    gpt2: (words, "may be causal|addmm", ""),
    bert: (words, "padding mask", "modeling_bert.py"),
}


@pytest.mark.parametrize("make_model", REFUSED)
def test_what_cannot_be_merged_exactly_is_refused_with_a_reason(
    make_model: Callable[[], nn.Module],
) -> None:
    inputs, reason, file = REFUSED[make_model]
    torch.manual_seed(0)
    model = scaled_up(make_model())
    with pytest.raises(TomeError) as caught:
        tomepass.apply(model, r=[4], example_inputs=inputs())
    error = caught.value
    assert re.search(reason, error.reason)
    assert file in str(error.source)
    assert error.node
    assert error.block in (0, 1)


def test_of_two_towers_the_causal_one_is_left_alone_and_said_so() -> None:
    text = {**SMALL, "intermediate_size": 64, "max_position_embeddings": 20, **TOKENS}
    torch.manual_seed(0)
    config = hf.CLIPConfig(vision_config=WIDE, text_config=text, projection_dim=16)
    model = scaled_up(hf.CLIPModel(config))
    inputs = {**words(), "pixel_values": images()["pixel_values"]}
    report = tomepass.explain(model, r=4, example_inputs=inputs)
    assert [s.tokens for s in report.streams] == [65]
    (refused,) = report.refused
    assert isinstance(refused, Mismatch)
    assert "attention mask" in refused.reason
    assert refused.source
    merged = tomepass.apply(model, r=4, example_inputs=inputs)(**inputs)
    plain = model(**inputs)
    torch.testing.assert_close(merged.text_embeds, plain.text_embeds)
    assert not torch.allclose(merged.image_embeds, plain.image_embeds)
