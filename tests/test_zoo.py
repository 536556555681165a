"""Every family of the zoo, exactly: what is found, what merging keeps, what is refused.

``zoo.FAMILIES`` and ``zoo.REFUSED`` say what must come out; docs/support-matrix.md is made of them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
import transformers as hf
from depth import at_hand
from encoders import compiled, duplicates, exported, kinds
from lossless import (
    LOSSLESS,
    assert_lossless,
    assert_macs_are_foretold,
    assert_r0_is_the_original,
    calls,
    errors,
    tensors,
)
from reference_models import dinov3_forward, vjepa2_forward
from torch import Generator, Tensor, fx, nn
from zoo import (
    CORE,
    COUNTS,
    FAMILIES,
    REFUSED,
    Stream,
    installed,
    make_inputs,
    make_model,
    output_of,
    relative_error,
    scaled_up,
)

import tomepass
from tomepass import Report, ToMe, TomeBackend, TomeError, reference
from tomepass.ops.attending.log_size import log_size
from tomepass.ops.matching.match import match
from tomepass.ops.merging.side import merge_bias, merge_rows, rows
from tomepass.ops.padding import padded_size
from tomepass.planning.plan_graph import plan_graph
from tomepass.reporting.report import make_report
from tomepass.rewriting.sweep import rewrite

OTHERS = [name for name in FAMILIES if name not in CORE]
"""What other files do for the core families, this one does for these."""

APART = [
    *("siglip_vision", "dinov3", "beit", "videomae", "yolos"),
    *("clipseg", "dpt", "clip", "bert_padded"),
]
"""One for each thing that families differ in: pooling by attention, rotary positions, a position
bias, a mean of a video, position embeddings of later layers, a decoder of another stream, a dense
head, two towers, padding. What must hold of the others is deep."""
READ = ["deit_distilled", "dinov2_registers", "vit_mae"]
"""Of those that differ in what reads the tokens, one each, with the ones above: read every time."""

SIDES = {
    "rotary tables": rows,
    "position bias": merge_bias,
    "position embeddings of later layers": merge_rows,
    "padding mask": padded_size,
}

ROTARY = {"dinov3": dinov3_forward, "vjepa2": vjepa2_forward}

pytestmark = pytest.mark.usefixtures("captured_once")

# ---- what is found ---------------------------------------------------------------------------


def assert_read_as_told(name: str, report: Report) -> None:
    family = FAMILIES[name]
    assert len(report.streams) == len(family.streams)
    for found, told in zip(report.streams, family.streams, strict=True):
        assert found.tokens == told.tokens
        assert found.protected == told.protected
        assert [b.index for b in found.blocks] == list(range(len(told.after)))
        assert tuple(b.tokens_out for b in found.blocks) == told.after
        lines = (line.split(": ")[1] for line in found.readout)
        assert tuple(dict.fromkeys(lines)) == told.readout
    for mismatches, told_reasons in (
        (report.unmerged, family.unmerged),
        (report.refused, family.refused),
    ):
        for mismatch in mismatches:
            assert any(re.search(told, mismatch.reason) for told in told_reasons), mismatch
            assert mismatch.node
            assert mismatch.source
        assert all(any(re.search(r, m.reason) for m in mismatches) for r in told_reasons)


@pytest.mark.parametrize(
    ("door", "name"),
    [
        *at_hand(
            [(exported, name) for name in FAMILIES],
            # What is special about the other two has tests of its own.
            [(exported, n) for n in (*READ, *APART) if n not in ("yolos", "clip")],
            [f"export-{name}" for name in FAMILIES],
        ),
        *at_hand(
            [(compiled, name) for name in FAMILIES],
            [(compiled, name) for name in ("dinov3",)],
            [f"dynamo-{name}" for name in FAMILIES],
        ),
    ],
)
def test_every_family_reads_exactly(
    name: str, shared_models: Any, door: Callable[..., Any]
) -> None:
    family = FAMILIES[name]
    model, inputs = shared_models[name], make_inputs(name)
    with torch.no_grad():
        model(**inputs)  # transformers takes a lock in some models' first call
    graph = door(model, inputs)
    method = ToMe(COUNTS)
    planned = plan_graph(graph, method)
    assert family.refused or not planned.mismatches, planned.mismatches
    result = rewrite(graph, planned)
    assert_read_as_told(name, make_report(name, graph, planned, result, None))
    module = result.module
    assert_macs_are_foretold(graph, method, module, planned)
    called = {n.target for n in module.graph.nodes}
    assert {side for side, op in SIDES.items() if op in called} == set(family.sides)
    assert weighed_beyond_the_blocks(module, family.streams) == family.pooled


def weighed_beyond_the_blocks(module: fx.GraphModule, streams: tuple[Stream, ...]) -> bool:
    """Do more attentions weigh by size than those of the blocks after the first?"""
    read = [n for n in calls(module, log_size) if any(user.users for user in n.users)]
    decoders = 1 if any("clipseg" in str(n.meta["stack_trace"]) for n in read) else 0
    return len(read) > decoders + sum(len(s.after) - 1 for s in streams)


@pytest.mark.parametrize("name", at_hand(REFUSED, ["swin", "t5_decoder"]))
def test_what_cannot_be_merged_exactly_is_refused_with_a_reason(name: str) -> None:
    refused = REFUSED[name]
    model, inputs = make_model(name), make_inputs(name)
    with pytest.raises(TomeError) as caught:
        tomepass.apply(model, r=[4], example_inputs=inputs)
    error = caught.value
    assert re.search(refused.reason, error.reason)
    assert refused.file in str(error.source)
    assert error.node
    assert error.block in (0, 1)


@torch.no_grad()
def test_of_two_towers_the_causal_one_is_left_alone(shared_models: Any) -> None:
    model, inputs = shared_models["clip"], make_inputs("clip")
    merged = tomepass.apply(model, r=4, example_inputs=inputs)(**inputs)
    plain = model(**inputs)
    torch.testing.assert_close(merged.text_embeds, plain.text_embeds)
    assert not torch.allclose(merged.image_embeds, plain.image_embeds)


# ---- what merging keeps ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", at_hand(OTHERS, ["dinov3"]))
def test_r0_is_the_original_to_the_bit(name: str, shared_models: Any) -> None:
    assert_r0_is_the_original(shared_models[name], make_inputs(name, batch=3))


SHORT = ["siglip_vision", "dinov3", "bert_padded"]


@torch.no_grad()
@pytest.mark.parametrize("name", at_hand(["vit", "clip_vision", *OTHERS], SHORT))
def test_classes_and_shapes_stay_and_merged_sequences_are_short(
    name: str, shared_models: Any
) -> None:
    model, inputs = shared_models[name], make_inputs(name)
    expected = model(**inputs)
    full, short = (
        tomepass.apply(model, r=COUNTS, example_inputs=inputs, outputs=outputs)(**inputs)
        for outputs in ("original", "merged")
    )
    assert type(full) is type(short) is type(expected)
    assert list(full) == list(short) == list(expected)
    assert [t.shape for t in tensors(full)] == [t.shape for t in tensors(expected)]
    assert relative_error(output_of(name, full), output_of(name, expected)) > 1e-3
    shortened = set()
    for long, left in zip(tensors(full), tensors(short), strict=True):
        if long.shape == left.shape:
            assert torch.equal(long, left)
        else:
            shortened.add((long.shape[1], left.shape[1]))
            # Each original token has the value of the one that holds it, to the bit.
            assert long.shape[2:] == left.shape[2:]
            for one, other in zip(long.flatten(2), left.flatten(2), strict=True):
                assert set(map(tuple, one.tolist())) == set(map(tuple, other.tolist()))
    assert shortened == {
        (int(found[2]), int(found[1]))
        for stream in FAMILIES[name].streams
        for line in stream.readout
        if (found := re.match(r"returned unmerged from (\d+) to (\d+) tokens", line))
    }


@pytest.mark.deep
@torch.no_grad()
@pytest.mark.parametrize("name", ["siglip_vision", "masked_images", "beit", "dinov3"])
def test_compiled_by_inductor_it_computes_what_eager_does(name: str, shared_models: Any) -> None:
    """Attention pooling, dense, position bias, rotary; test_backend.py does the plain ones."""
    model, inputs = shared_models[name], make_inputs(name)
    merged = tomepass.apply(model, r=COUNTS, example_inputs=inputs)
    fast = torch.compile(merged, fullgraph=True)
    assert max(errors(fast(**inputs), merged(**inputs))) < LOSSLESS


# ---- lossless on duplicates ------------------------------------------------------------------


def alike(name: str, batch: int = 3) -> dict[str, Any]:
    """An input of a few kinds of tokens, each many times, as a family takes it."""
    inputs = make_inputs(name, batch)
    if name == "ast":
        inputs["input_values"] = duplicates(channels=1, patch=8, grid=8)[:, 0]
    elif name == "whisper":
        inputs["input_features"] = bands(16, 64)
    elif name == "wav2vec2":
        inputs["input_values"] = pieces(50, 20).flatten(1)
    elif FAMILIES[name].kind == "video":
        (video,) = (key for key in inputs if key.startswith("pixel_values"))
        inputs[video] = tubelets()
    elif "pixel_values" in inputs:
        inputs["pixel_values"] = duplicates(grid=8)
    if "input_ids" in inputs:
        inputs["input_ids"] = kinds(batch, 24) * 7 + 5
    return inputs


def pieces(count: int, *shape: int, batch: int = 3) -> Tensor:
    """``[B, count, *shape]``: random pieces of few kinds."""
    layout = kinds(batch, count)
    drawn = torch.randn(int(layout.max()) + 1, *shape, generator=Generator().manual_seed(1))
    return drawn[layout]


def tubelets() -> Tensor:
    """Videos ``[B, 4, 3, 16, 16]`` of 2 x 4 x 4 pieces."""
    x = pieces(32, 2, 3, 4, 4).unflatten(1, (2, 4, 4))
    return x.permute(0, 1, 4, 5, 2, 6, 3, 7).reshape(3, 4, 3, 16, 16)


def bands(channels: int, length: int) -> Tensor:
    """Spectra that stay the same for a while: what overlaps two bands is like nothing else."""
    drawn = torch.randn(3, channels, 3, generator=Generator().manual_seed(1))
    lengths = torch.tensor([length // 2, length // 4, length - length // 2 - length // 4])
    return drawn.repeat_interleave(lengths, dim=-1)


@torch.no_grad()
def without_positions(name: str, factor: float = 6.0) -> nn.Module:
    """A fresh model to which all places are alike."""
    torch.manual_seed(0)
    model = scaled_up(FAMILIES[name].make(), factor)
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        # Of a weight-normed convolution the length of the weights, not their direction.
        place = "position" in key or ("pos_conv" in key and not key.endswith("original1"))
        if place and value.is_floating_point():
            value.zero_()
    if name == "videomae":  # a plain attribute
        model.videomae.embeddings.position_embeddings.zero_()
    return model


PLACELESS = [name for name in OTHERS if not FAMILIES[name].rotary]
# Where weights are so large that attention sees single tokens alone, sizes show in nothing.
FACTORS = {"siglip_classifier": 2.0, "siglip": 2.0}


@pytest.mark.parametrize(
    "name",
    at_hand(
        [n for n in PLACELESS if n != "bert_padded"],
        ["siglip_vision", "beit", "yolos"],
    ),
)
def test_every_family_is_lossless_on_duplicates(name: str) -> None:
    counts = [5, 0, 4] if "text" in FAMILIES[name].kind else COUNTS
    model = without_positions(name, FACTORS.get(name, 6.0))
    assert_lossless(model, alike(name), counts)


@torch.no_grad()
def test_a_padded_batch_is_lossless_on_duplicates() -> None:
    # No control: what hides the padding is the sizes, which therefore always count.
    model, inputs = without_positions("bert_padded", 3.0), alike("bert_padded")
    merged = tomepass.apply(model, r=[3, 0, 2], example_inputs=inputs)(**inputs)
    expected, real = model(**inputs), inputs["attention_mask"].bool()
    ours, theirs = merged.last_hidden_state[real], expected.last_hidden_state[real]
    assert relative_error(ours, theirs) < LOSSLESS


# ---- hidden states and attention weights -----------------------------------------------------

# The others do not take the arguments, or have two towers to ask.
TELLING = [n for n in PLACELESS if n not in ("llava", "clipseg", "clip", "siglip", "bert_padded")]


@torch.no_grad()
@pytest.mark.parametrize("name", at_hand(TELLING, ["beit"]))
def test_hidden_states_and_attention_weights_are_lossless(name: str) -> None:
    model = without_positions(name, FACTORS.get(name, 6.0))
    model.set_attn_implementation("eager")
    counts = [5, 0, 4] if "text" in FAMILIES[name].kind else COUNTS
    inputs = {**alike(name), "output_hidden_states": True, "output_attentions": True}
    expected = model(**inputs)
    assert expected.hidden_states or expected.attentions
    merged = tomepass.apply(model, r=counts, example_inputs=inputs)(**inputs)
    assert list(merged) == list(expected)
    for field in ("hidden_states", "attentions"):
        assert len(merged.get(field) or ()) == len(expected.get(field) or ())
    assert max(errors(merged, expected)) < LOSSLESS


# ---- rotary positions ------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "prop_attn"),
    at_hand(itertools.product(ROTARY, (True, False)), [("dinov3", True)]),
)
def test_rotary_attention_is_a_plain_references(
    name: str, prop_attn: bool, shared_models: Any
) -> None:
    model, inputs = shared_models[name], make_inputs(name, batch=4)
    merged = tomepass.apply(model, ToMe([9, 6, 4], prop_attn=prop_attn), example_inputs=inputs)
    expected = ROTARY[name](model, next(iter(inputs.values())), [9, 6, 4], prop_attn)
    ours = merged(**inputs).last_hidden_state
    theirs = reference.unmerge(expected.hidden, expected.source)
    clear = expected.margin > 1e-5  # elsewhere a rounding may decide who merges
    assert int(clear.sum()) >= 3
    assert relative_error(ours[clear], theirs[clear]) < LOSSLESS
    plain = model(**inputs).last_hidden_state
    assert relative_error(plain[clear], theirs[clear]) > 1e-2


# ---- ways to run -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", at_hand(["siglip_vision", "beit", "dinov3", "masked_images"], []))
def test_dynamic_shapes_of_the_dynamo_door(name: str, shared_models: Any) -> None:
    model = shared_models[name]
    model(**make_inputs(name))
    backend = TomeBackend(ToMe(COUNTS), inner="eager")
    fast = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for batch in (2, 3):
        inputs = make_inputs(name, batch)
        merged = tomepass.apply(model, r=COUNTS, example_inputs=inputs)
        assert max(errors(fast(**inputs), merged(**inputs))) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", at_hand(["vit", "siglip_vision", "dinov3"], []))
def test_two_resolutions_of_one_model(name: str, shared_models: Any) -> None:
    model = shared_models[name]
    extra = {} if name == "dinov3" else {"interpolate_pos_encoding": True}
    merged = tomepass.apply(model, r=COUNTS)
    for height, width in ((32, 32), (48, 32)):
        inputs = {"pixel_values": torch.randn(2, 3, height, width), **extra}
        expected = model(**inputs)
        outputs = merged(**inputs)
        assert [t.shape for t in tensors(outputs)] == [t.shape for t in tensors(expected)]
        (stream,) = merged.report(inputs).streams
        assert stream.tokens == height * width // 16 + len(FAMILIES[name].streams[0].protected)
        assert [b.r for b in stream.blocks] == COUNTS
        whole = tomepass.apply(model, r=0)(**inputs)
        assert relative_error(output_of(name, whole), output_of(name, expected)) < 1e-5


KINDS = ["vit", "siglip_vision", "beit", "dinov3", "bert_padded"]


@torch.no_grad()
@pytest.mark.parametrize("name", at_hand(KINDS, ["beit"]))
def test_autocast(name: str, shared_models: Any) -> None:
    model, inputs = shared_models[name], make_inputs(name)
    merged, whole = (tomepass.apply(model, r=r, example_inputs=inputs) for r in (COUNTS, 0))
    with torch.autocast("cpu", torch.bfloat16):
        expected, outputs, same = model(**inputs), merged(**inputs), whole(**inputs)
    for ours, theirs, kept in zip(tensors(outputs), tensors(expected), tensors(same), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.isfinite().all()
        assert torch.equal(kept, theirs)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "dtype"),
    at_hand(
        itertools.product(KINDS, [torch.float16, torch.bfloat16]),
        [("beit", torch.float16)],
    ),
)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = make_model(name).to(dtype)
    inputs = pytree.tree_map(
        lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v,
        make_inputs(name),
    )
    expected = model(**inputs)
    merged, whole = (tomepass.apply(model, r=r, example_inputs=inputs) for r in (COUNTS, 0))
    outputs, same = merged(**inputs), whole(**inputs)
    for ours, theirs, kept in zip(tensors(outputs), tensors(expected), tensors(same), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.isfinite().all()
        assert torch.equal(kept, theirs)


@pytest.mark.deep
@pytest.mark.parametrize("name", at_hand(["vit", "siglip_vision", "clip_vision"], ["vit"]))
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model, inputs = make_model(name), make_inputs(name)
    model.train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        merged = tomepass.apply(model, r=8, example_inputs=inputs)
        assert merged.report(inputs).blocks[0].r == 8
        output_of(name, merged(**inputs)).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable()
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# ---- from a graph break on -------------------------------------------------------------------


def siglip2() -> tuple[Any, dict[str, Tensor]]:
    """Its position embeddings are resized image by image in Python: Dynamo breaks behind them."""
    torch.manual_seed(0)
    config = hf.Siglip2VisionConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        patch_size=4,
        num_patches=64,
    )
    inputs = {
        "pixel_values": torch.randn(2, 64, 48),
        "pixel_attention_mask": torch.ones(2, 64, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[8, 8], [5, 10]]),
    }
    inputs["pixel_attention_mask"][1, 50:] = 0
    return scaled_up(hf.Siglip2VisionModel(config)), inputs


@pytest.mark.deep
@pytest.mark.skipif(not installed("transformers>=5.2"), reason="its mask was one of floats")
@torch.no_grad()
def test_siglip2_merges_behind_its_graph_break_where_protected_tokens_are_given() -> None:
    model, inputs = siglip2()
    expected = model(**inputs)
    matches = []

    def inner(gm: fx.GraphModule, example: list[Any]) -> Any:
        matches.append(len(calls(gm, match)))
        return gm.forward

    merged = torch.compile(model, backend=TomeBackend(ToMe(COUNTS, protected=()), inner=inner))
    got = merged(**inputs)
    assert sum(matches) == 2
    for name in ("last_hidden_state", "pooler_output"):
        assert got[name].shape == expected[name].shape
        assert relative_error(got[name], expected[name]) > 1e-3
    torch.compiler.reset()
    whole = torch.compile(model, backend=TomeBackend(ToMe(0, protected=()), inner="eager"))
    assert torch.equal(whole(**inputs).pooler_output, expected.pooler_output)


def siglip2_encoder(model: Any) -> nn.Module:
    """transformers 5.0 keeps it one level down."""
    return getattr(model, "vision_model", model).encoder


@torch.no_grad()
def test_siglip2s_encoder_merges_by_itself() -> None:
    model, _ = siglip2()
    x = {"inputs_embeds": torch.randn(2, 64, 32)}
    report = tomepass.explain(siglip2_encoder(model), r=COUNTS, example_inputs=x)
    assert report.protected == ()
    assert [b.tokens_out for b in report.blocks] == [59, 59, 50]
    got = tomepass.apply(siglip2_encoder(model), r=COUNTS, example_inputs=x)(**x)
    assert got.last_hidden_state.shape == (2, 64, 32)


@torch.no_grad()
def test_constants_of_a_model_have_a_source_behind_the_backend(shared_models: Any) -> None:
    """BEiT's index of relative positions is a constant of the graph, which AOTAutograd asks for."""
    model, inputs = shared_models["beit"], make_inputs("beit")
    fast = torch.compile(model, backend=TomeBackend(ToMe(COUNTS), inner="aot_eager"))
    merged = tomepass.apply(model, r=COUNTS, example_inputs=inputs)
    assert max(errors(fast(**inputs), merged(**inputs))) < 1e-5
