"""Every family of the zoo, exactly: what is found, what merging keeps, what is refused.

``zoo.FAMILIES`` and ``zoo.REFUSED`` say what must come out; docs/support-matrix.md is made of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from encoders import compiled, duplicates, exported, kinds, report_on
from lossless import LOSSLESS, assert_lossless, errors, rewritten, tensors
from torch import Generator, Tensor, nn
from zoo import (
    CORE,
    COUNTS,
    FAMILIES,
    REFUSED,
    make_inputs,
    make_model,
    output_of,
    relative_error,
    scaled_up,
)

import tomepass
from tomepass import Report, ToMe, TomeBackend, TomeError
from tomepass.ops.log_size import log_size
from tomepass.ops.padding import padded_size
from tomepass.ops.side import merge_bias, merge_rows, rows

OTHERS = [name for name in FAMILIES if name not in CORE]
"""What other files do for the core families, this one does for these."""

SIDES = {
    "rotary tables": rows,
    "position bias": merge_bias,
    "position embeddings of later layers": merge_rows,
    "padding mask": padded_size,
}

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
            assert any(reason in mismatch.reason for reason in told_reasons), mismatch
            assert mismatch.node
            assert "modeling_" in str(mismatch.source)
        assert all(any(r in m.reason for m in mismatches) for r in told_reasons)


@pytest.mark.parametrize("door", [exported, compiled], ids=["export", "dynamo"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_reads_exactly(
    name: str, shared_models: Any, door: Callable[..., Any]
) -> None:
    family = FAMILIES[name]
    graph = door(shared_models[name], make_inputs(name))
    method = ToMe(COUNTS)
    assert_read_as_told(name, report_on(graph, method))
    called = [n.target for n in rewritten(graph, method, partly=bool(family.refused)).graph.nodes]
    assert {side for side, op in SIDES.items() if op in called} == set(family.sides)
    # One bias an attention after the first merge, and one for the attention that pools.
    attentions = sum(len(s.after) - 1 for s in family.streams)
    assert (called.count(log_size) > attentions) == family.pooled


@pytest.mark.parametrize("name", ["deit_distilled", "siglip_vision", "beit", "dinov3", "dpt"])
def test_a_dynamic_dynamo_graph_reads_the_same(name: str, shared_models: Any) -> None:
    graph = compiled(shared_models[name], make_inputs(name, batch=3), dynamic=True)
    assert_read_as_told(name, report_on(graph, ToMe(COUNTS)))


@pytest.mark.parametrize("name", REFUSED)
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
    warned = torch.compile(model, backend=TomeBackend(ToMe([4]), on_unmatched="warn"))
    assert warned is not None


@torch.no_grad()
def test_of_two_towers_the_causal_one_is_left_alone(shared_models: Any) -> None:
    model, inputs = shared_models["clip"], make_inputs("clip")
    merged = tomepass.apply(model, r=4, example_inputs=inputs)(**inputs)
    plain = model(**inputs)
    torch.testing.assert_close(merged.text_embeds, plain.text_embeds)
    assert not torch.allclose(merged.image_embeds, plain.image_embeds)


# ---- what merging keeps ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_r0_is_the_original_to_the_bit(name: str, shared_models: Any) -> None:
    model, inputs = shared_models[name], make_inputs(name, batch=3)
    expected = tensors(model(**inputs))
    merged = tomepass.apply(model, r=0, example_inputs=inputs)
    backend = torch.compile(model, backend=TomeBackend(ToMe(0), inner="eager"))
    for outputs in (merged(**inputs), backend(**inputs)):
        for ours, theirs in zip(tensors(outputs), expected, strict=True):
            assert torch.equal(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
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
            assert long.shape[2:] == left.shape[2:]
    assert shortened == {
        (int(found[2]), int(found[1]))
        for stream in FAMILIES[name].streams
        for line in stream.readout
        if (found := re.match(r"returned unmerged from (\d+) to (\d+) tokens", line))
    }


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["vivit", "siglip_classifier", "siglip_vision", "dpt", "beit", "dinov3"]
)
def test_compiled_by_inductor_it_computes_what_eager_does(name: str, shared_models: Any) -> None:
    """One of each kind: class token, mean, attention pooling, dense, position bias, rotary."""
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
        if ("position" in key or "pos_conv" in key) and value.is_floating_point():
            value.zero_()
    if name == "videomae":  # a plain attribute
        model.videomae.embeddings.position_embeddings.zero_()
    return model


PLACELESS = [name for name in OTHERS if not FAMILIES[name].rotary]


@pytest.mark.parametrize("name", PLACELESS)
def test_every_family_is_lossless_on_duplicates(name: str) -> None:
    assert_lossless(without_positions(name), alike(name), COUNTS)
