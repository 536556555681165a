"""The rewritten graph computes what merging means, exactly, or is not made.

Three oracles: on duplicate tokens merging must change nothing; a readout must see what it would
see of the unmerged tokens; and whole models must agree with eager references of their own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
import transformers as hf
from depth import at_hand, in_turn
from encoders import (
    Block,
    Encoder,
    compiled,
    duplicates,
    exported,
    make,
    pixels,
    with_zero_positions,
)
from generated import Kind, Spelling, build, without_positions
from lossless import (
    LOSSLESS,
    assert_lossless,
    assert_r0_is_the_original,
    calls,
    errors,
    rewritten,
    tensors,
)
from reference_models import (
    deit_forward,
    dinov2_with_registers_forward,
    ijepa_forward,
    vit_forward,
)
from torch import Tensor, fx, nn
from zoo import CORE, FAMILIES, make_inputs, make_model, output_of, relative_error, scaled_up

import tomepass
from tomepass import ToMe, TomeBackend, TomeError, reference
from tomepass.ops.attending.log_size import log_size
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge
from tomepass.ops.merging.unmerge import unmerge
from tomepass.ops.merging.weighted_mean import weighted_mean
from tomepass.planning.plan_graph import plan_graph

pytestmark = pytest.mark.usefixtures("captured_once")

COUNTS = [12, 8, 5]


def of_duplicates(family: str) -> dict[str, Any]:
    """Duplicate patches as a family takes them."""
    if family == "ast":
        return {"input_values": duplicates(channels=1, patch=8, grid=8)[:, 0]}
    return {"pixel_values": duplicates(grid=8)}


# ---- the families ----------------------------------------------------------------------------


# tests/handover/test_merged.py says so of every core family, where it is exported.
@pytest.mark.parametrize("family", at_hand(CORE, []))
def test_r0_is_the_original_to_the_bit(family: str, shared_models: Any) -> None:
    assert_r0_is_the_original(shared_models[family], make_inputs(family, batch=3))


READ_APART = ["dinov2_registers", "clip_vision", "ijepa"]
"""Of the core families one for each way to read tokens; the others are deep."""


@pytest.mark.parametrize("family", at_hand(CORE, READ_APART))
def test_every_family_is_lossless_on_duplicates(family: str) -> None:
    model = make_model(family)
    assert_lossless(model, of_duplicates(family), COUNTS)


@pytest.mark.parametrize("family", at_hand(CORE, ["clip_vision"]))
@torch.no_grad()
def test_hidden_states_keep_their_shapes_and_are_lossless(family: str) -> None:
    model = with_zero_positions(make_model(family))
    inputs = {**of_duplicates(family), "output_hidden_states": True}
    expected = model(**inputs)
    merged = tomepass.apply(model, r=COUNTS, example_inputs=inputs)(**inputs)
    assert merged.keys() == expected.keys()
    assert len(merged.hidden_states) == len(expected.hidden_states)
    assert max(errors(merged, expected)) < LOSSLESS


REFERENCES: dict[str, Callable[..., Any]] = {
    "vit": vit_forward,
    "deit_distilled": deit_forward,
    "ijepa": ijepa_forward,
    "dinov2_registers": dinov2_with_registers_forward,
}


@torch.no_grad()
@pytest.mark.parametrize(("name", "prop_attn"), in_turn(REFERENCES, [True, False]))
def test_merged_logits_are_a_plain_references(
    name: str, prop_attn: bool, shared_models: Any
) -> None:
    model, inputs = shared_models[name], make_inputs(name, batch=6)
    r = [9, 14, 8]
    merged = tomepass.apply(model, ToMe(r, prop_attn=prop_attn), example_inputs=inputs)
    expected = REFERENCES[name](model, inputs["pixel_values"], r, prop_attn, with_margin=True)
    clear = expected.margin > 1e-5  # elsewhere a rounding may decide who merges
    assert int(clear.sum()) >= 5
    ours = output_of(name, merged(**inputs))
    assert relative_error(ours[clear], expected.output[clear]) < 1e-5
    plain = output_of(name, model(**inputs))
    assert relative_error(ours[clear], plain[clear]) > 1e-3


@pytest.mark.parametrize("family", at_hand(CORE, ["dinov2_registers"]))
@torch.no_grad()
def test_both_doors_compute_the_same(family: str, shared_models: Any) -> None:
    model, inputs = shared_models[family], make_inputs(family)
    merged = tomepass.apply(model, r=9, example_inputs=inputs)(**inputs)
    backend = torch.compile(model, backend=TomeBackend(ToMe(9), inner="eager"), fullgraph=True)
    for ours, theirs in zip(tensors(backend(**inputs)), tensors(merged), strict=True):
        assert torch.equal(ours, theirs)


# ---- transformers models that need no more than this -----------------------------------------

WIDE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
    "intermediate_size": 64,
}


def siglip() -> nn.Module:
    return hf.SiglipVisionModel(hf.SiglipVisionConfig(**WIDE))


def beit_without_bias() -> nn.Module:
    config = hf.BeitConfig(**WIDE, use_absolute_position_embeddings=True, vocab_size=9)
    return hf.BeitForImageClassification(config)


def vit_for_masked_images() -> nn.Module:
    return hf.ViTForMaskedImageModeling(hf.ViTConfig(**WIDE, encoder_stride=4))


def dinov2_backbone() -> nn.Module:
    config = hf.Dinov2Config(**WIDE, mlp_ratio=2, out_features=["stage1", "stage3"])
    return hf.Dinov2Backbone(config)


def dpt() -> nn.Module:
    return hf.DPTModel(hf.DPTConfig(**WIDE, backbone_out_indices=[0, 1, 2]))


def owlvit() -> nn.Module:
    return hf.OwlViTVisionModel(hf.OwlViTVisionConfig(**WIDE))


# tests/test_zoo.py has the others, or their like.
@pytest.mark.parametrize(
    "make_other",
    at_hand(
        [siglip, beit_without_bias, vit_for_masked_images, dinov2_backbone, dpt, owlvit],
        [beit_without_bias],
    ),
)
def test_other_models_are_lossless_with_no_code_of_their_own(
    make_other: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model, inputs = scaled_up(make_other()), {"pixel_values": duplicates(grid=8)}
    assert_lossless(model, inputs, COUNTS)


# ---- readouts --------------------------------------------------------------------------------


class ReadBy(Encoder):
    """An encoder whose readout is a function of itself and its tokens."""

    def __init__(self, read: Callable[[Any, Tensor], Any], **choices: Any) -> None:
        super().__init__(**choices)
        self.reading = read
        self.conv = nn.Conv2d(16, 8, 3, padding=1)
        self.probe = nn.Parameter(torch.randn(1, 1, 16))
        self.pool = nn.MultiheadAttention(16, 2, batch_first=True)

    def read(self, x: Tensor) -> Any:
        return self.reading(self, x)


def probed(model: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return model.probe.expand(x.shape[0], -1, -1), x, x


def softmax_pooled(model: Any, x: Tensor) -> Tensor:
    return (x * model.head(x)[..., :1].softmax(1)).sum(1)


def written_to(model: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x.relu_()
    x *= 2
    return x.mean(1)


# Four tokens of the model's own in front, 36 patches, three more behind; see `read_by`.
READOUTS: dict[str, Callable[[Any, Tensor], Any]] = {
    "first": lambda m, x: x[:, 0],
    "last": lambda m, x: x[:, -1],
    "third of those in front": lambda m, x: x[:, 1:][:, 1],
    "some in front": lambda m, x: x[:, 1:3],
    "mean": lambda m, x: x.mean(1),
    "mean, dimensions kept, counted from the end": lambda m, x: x.mean(dim=-2, keepdim=True),
    "mean in float64": lambda m, x: x.mean(1, dtype=torch.float64),
    "mean of a transpose": lambda m, x: m.head(x).mT.mean(-1),
    "mean of patches": lambda m, x: x[:, 4:-3].mean(1),
    "mean without registers": lambda m, x: torch.cat([x[:, 0], x[:, 4:].mean(1)], dim=-1),
    "mean behind a slice of a slice": lambda m, x: x[:, 2:][:, :-2][:, 1:].mean(1),
    "mean of a folded batch": lambda m, x: m.head(x.reshape(-1, 16)).view(*x.shape[:2], 5).mean(1),
    "mean of all": lambda m, x: x.mean(),
    "mean over tokens and channels": lambda m, x: x.mean((1, 2)),
    "sum": lambda m, x: x.sum(1),
    "maximum": lambda m, x: x.max(1).values,
    "variance": lambda m, x: x.var(1),
    "adaptive pooling": lambda m, x: F.adaptive_avg_pool1d(x.mT, 3),
    "one patch": lambda m, x: x[:, 10],
    "a few patches": lambda m, x: x[:, 5:9],
    "every other token": lambda m, x: x[:, ::2],
    "no token": lambda m, x: x[:, 5:5].sum(1) + x[:, 0],
    "by index": lambda m, x: x[:, [0, 3, 5]],
    "by content": lambda m, x: x[torch.arange(x.shape[0]), x[..., 0].argmax(1)],
    "all": lambda m, x: x,
    "all, projected": lambda m, x: m.head(x),
    "all, transposed": lambda m, x: x.mT,
    "all, normalised": lambda m, x: F.normalize(x, dim=-1),
    "all, batch second": lambda m, x: x.transpose(0, 1),
    "all, as one vector": lambda m, x: x.flatten(1),
    "all, folded": lambda m, x: x.reshape(-1, 16),
    "patches": lambda m, x: x[:, 4:-3],
    "without registers": lambda m, x: torch.cat([x[:, :1], x[:, 4:]], dim=1),
    "two halves": lambda m, x: torch.stack(x.chunk(2, -1)),
    "several": lambda m, x: {"a": x, "b": (x[:, 0], x[:, 4:], x[:, 4:].mT), "c": [x.mean(1)]},
    "flipped": lambda m, x: x.flip(1)[:, 0],
    "rolled": lambda m, x: x.roll(1, 1),
    "grid": lambda m, x: m.conv(x[:, 4:-3].mT.reshape(-1, 16, 6, 6)),
    "grid, channels last": lambda m, x: x[:, 4:-3].unflatten(1, (6, 6)).permute(0, 3, 1, 2),
    "running sum": lambda m, x: x.cumsum(1),
    "padded": lambda m, x: F.pad(x, (0, 0, 1, 0)),
    "repeated": lambda m, x: x.repeat(1, 2, 1),
    "normalised over tokens": lambda m, x: F.instance_norm(x.mT),
    "batch norm of a folded batch": lambda m, x: F.batch_norm(
        x.reshape(-1, 16), torch.zeros(16), torch.ones(16)
    ).view(x.shape),
    "number of tokens": lambda m, x: x[:, 0] * x.shape[1],
    "similarities": lambda m, x: x @ x.mT,
    "second moments": lambda m, x: x.mT @ x,
    "differences": lambda m, x: (x[:, :, None] - x[:, None]).abs().mean(-1),
    "position added": lambda m, x: x + torch.arange(43.0)[:, None],
    "position added, then the tokens": lambda m, x: (x + torch.arange(43.0)[:, None]) * x,
    "pooled by softmax": softmax_pooled,
    "pooled by attention": lambda m, x: m.pool(*probed(m, x), need_weights=False)[0],
    "pooled by attention by hand": lambda m, x: m.pool(*probed(m, x))[0],
    "in place": written_to,
}


def read_by(readout: str) -> Any:
    return make(ReadBy, read=READOUTS[readout], start=4, end=3)


@functools.cache
def unmerged_tokens() -> Tensor:
    """What the same encoder with the same merges returns if it returns its tokens."""
    x = pixels(3)
    hidden: Tensor = tomepass.apply(read_by("all"), r=[9, 8], example_inputs=x)(x)
    assert hidden.shape == (3, 43, 16)
    return hidden


@pytest.fixture(scope="module")
def all_read() -> dict[str, tuple[Any, Any, Any]]:
    """What every readout makes of the unmerged tokens, of the merged ones, of those as they were:
    all of them read in one model."""
    x = pixels(3)

    def read(model: Any, tokens: Tensor) -> dict[str, Any]:
        return {name: readout(model, tokens) for name, readout in READOUTS.items()}

    with torch.no_grad():
        model = make(ReadBy, read=read, start=4, end=3)
        merged = tomepass.apply(model, r=[9, 8], example_inputs=x)
        found = read(model, unmerged_tokens().clone()), merged(x), model(x)
    return {name: tuple(each[name] for each in found) for name in READOUTS}


@pytest.mark.parametrize("readout", READOUTS)
def test_each_of_many_readouts_sees_what_it_would_of_the_unmerged_tokens(
    readout: str, all_read: Any
) -> None:
    expected, got, plain = all_read[readout]
    assert max(errors(got, expected)) < 1e-5
    # And none of it by leaving the tokens as they were.
    assert max(errors(got, plain)) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    "readout", at_hand(READOUTS, ["mean without registers", "pooled by softmax", "in place"])
)
def test_a_readout_sees_what_it_would_of_the_unmerged_tokens(readout: str) -> None:
    x, model = pixels(3), read_by(readout)
    expected = READOUTS[readout](model, unmerged_tokens().clone())
    got = tomepass.apply(model, r=[9, 8], example_inputs=x)(x)
    assert max(errors(got, expected)) < 1e-5
    # And none of it by leaving the tokens as they were.
    assert max(errors(got, model(x))) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    "readout", at_hand(["all", "patches", "without registers", "several", "grid"], ["several"])
)
def test_a_readout_is_lossless_on_duplicates(readout: str) -> None:
    assert_lossless(read_by(readout), {"pixels": duplicates()}, [9, 6])


@torch.no_grad()
def test_merged_outputs_are_the_unmerged_ones_made_short() -> None:
    x = pixels(3)
    model = read_by("several")
    method = ToMe([9, 8], trace_source=True)
    long = tomepass.apply(model, method, example_inputs=x)(x)
    applied = tomepass.apply(model, method, example_inputs=x, outputs="merged")
    short, source = applied(x), applied.source(x)
    assert source.shape == (3, 43)
    assert short["a"].shape == (3, 43 - 17, 16)
    assert torch.equal(reference.unmerge(short["a"], source), long["a"])
    # Protected tokens come first in a merged sequence: four in front are not in this output.
    assert short["b"][1].shape == (3, 43 - 17 - 4, 16)
    assert torch.equal(reference.unmerge(short["b"][1], source[:, 4:] - 4), long["b"][1])
    assert torch.equal(short["b"][2], short["b"][1].mT)
    for name in ("b", "c"):
        assert torch.equal(short[name][0], long[name][0])


@torch.no_grad()
@pytest.mark.parametrize("name", at_hand(REFERENCES, ["ijepa", "dinov2_registers"]))
def test_the_source_map_is_the_references(name: str, shared_models: Any) -> None:
    model, inputs = shared_models[name], make_inputs(name, batch=4)
    r = [9, 14, 8]
    applied = tomepass.apply(model, ToMe(r, trace_source=True), example_inputs=inputs)
    expected = REFERENCES[name](model, inputs["pixel_values"], r, with_margin=True)
    clear = expected.margin > 1e-5
    assert bool(clear.any())
    assert torch.equal(applied.source(**inputs)[clear], expected.source[clear])


@torch.no_grad()
def test_hidden_states_of_every_block_show_its_own_merges() -> None:
    model, inputs = make_model("vit"), {**make_inputs("vit"), "output_hidden_states": True}
    hidden = tomepass.apply(model, r=COUNTS, example_inputs=inputs)(**inputs).hidden_states
    distinct = [len({tuple(t.tolist()) for t in states[0]}) for states in hidden]
    assert distinct == [65, 53, 45, 40]


# ---- protected tokens ------------------------------------------------------------------------


@torch.no_grad()
def test_protected_tokens_never_merge_wherever_they_stand() -> None:
    x = pixels(4)
    for start, end in ((1, 0), (0, 2), (2, 3)):
        model = make(start=start, end=end, readout="dense", depth=3)
        applied = tomepass.apply(model, ToMe([18, 9, 4], trace_source=True), example_inputs=x)
        source = applied.source(x)
        held = [*range(start), *range(start + 36, start + 36 + end)]
        assert source[:, held].tolist() == [list(range(len(held)))] * 4
        others = [p for p in range(source.shape[1]) if p not in held]
        assert int(source[:, others].min()) == len(held)
        assert int(source.max()) == len(held) + 36 - 31 - 1


@torch.no_grad()
def test_given_protected_positions_never_merge() -> None:
    x = pixels(4)
    method = ToMe([16, 8], protected=(0, 7, 20), trace_source=True)
    applied = tomepass.apply(make(readout="dense"), method, example_inputs=x)
    source = applied.source(x)
    assert source[:, [0, 7, 20]].tolist() == [[0, 1, 2]] * 4
    assert sorted(source[0].bincount().tolist())[:3] == [1, 1, 1]


@torch.no_grad()
def test_an_unprotected_class_token_is_still_read_where_it_went() -> None:
    x = duplicates()
    model = with_zero_positions(make())
    merged = tomepass.apply(model, ToMe([6, 4], protected=()), example_inputs=x)(x)
    assert relative_error(merged, model(x)) < LOSSLESS


# ---- inside a stream -------------------------------------------------------------------------


class FromBefore(Block):
    """The MLP reads the value from before the merge, the sum adds to the one after it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.attention(self.norm1(x))
        return y + self.mlp(self.norm2(x))


class Remembering(Encoder):
    """Adds the embedded tokens to the stream again and again."""

    def forward(self, pixels: Tensor) -> Any:
        first = x = self.embed(pixels)
        for block in self.blocks:
            x = block(x) + 0.5 * first
        return self.read(self.final(x))


class Excited(Block):
    """Squeeze and excitation: a mean over tokens scales the stream."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x * self.norm1(x).mean(1, keepdim=True).sigmoid()


class Classed(Block):
    """Every token gets something of the class token."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + 0.3 * self.norm1(x[:, :1])


@pytest.mark.parametrize(
    ("form", "readout"), in_turn([FromBefore, Excited, Classed], ["class", "mean", "dense"])
)
def test_what_a_block_does_to_all_tokens_alike_is_lossless(form: type[Block], readout: Any) -> None:
    model = make(blocks=[form] * 3, readout=readout)
    assert_lossless(model, {"pixels": duplicates()}, [8, 6, 4])


@pytest.mark.parametrize("readout", ["class", "dense"])
def test_values_from_before_a_merge_meet_later_ones(readout: Any) -> None:
    model = make(Remembering, readout=readout, depth=3)
    assert_lossless(model, {"pixels": duplicates()}, [8, 6, 4])


@torch.no_grad()
def test_a_value_from_before_a_merge_is_merged_as_the_stream_was() -> None:
    x = pixels(3)

    class Both(Encoder):
        """Its stream carries a second copy of itself, added at the end of the block."""

        def forward(self, pixels: Tensor) -> Any:
            x = self.embed(pixels)
            y = self.blocks[0](x) + x
            return self.blocks[1](y), x

    model = make(Both)
    graph = exported(model, {"pixels": x})
    module = rewritten(graph, ToMe([9]))
    merges = calls(module, merge)
    assert len(merges) == 2
    assert merges[0].args[1:] == merges[1].args[1:]


def test_the_blank_operand_of_a_product_may_have_the_shape_of_the_scores() -> None:
    model = build(Kind(depth=3), Spelling(product="baddbmm"))
    assert_lossless(model, {"pixels": duplicates()}, [8, 6, 4])


@pytest.mark.parametrize(("start", "parting"), in_turn([0, 2], ["split", "copy", "slices"]))
def test_tokens_of_its_own_that_a_model_does_not_have_may_be_cut_off(
    start: int, parting: Any
) -> None:
    kind = Kind(position="patch rotary", start=start, readout="mean")
    model = without_positions(build(kind, Spelling(parting=parting)))
    assert_lossless(model, {"pixels": duplicates()}, [8, 6])


class DepthwiseConvolution(Block):
    """A convolution over the grid, added back to the stream."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        grid = self.conv(x.mT.unflatten(2, (6, 6)))
        return x + grid.flatten(2).mT


class PositionsAgain(Block):
    """A position embedding in every block."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.positions = nn.Parameter(torch.randn(1, 36, width))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.positions


class Shifted(Block):
    """Each token gets something of its neighbour."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + x.roll(1, 1)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (DepthwiseConvolution, "brings one row a token"),
        (Shifted, "brings one row a token"),
    ],
)
def test_reading_by_position_inside_a_stream_is_refused(form: type[Block], reason: str) -> None:
    model = make(blocks=[form] * 3, start=0, readout="mean")
    with pytest.raises(TomeError, match=reason) as caught:
        tomepass.apply(model, r=4, example_inputs=pixels())
    error = caught.value
    assert error.block in (0, 1)
    assert error.node
    assert "test_sweep.py:" in str(error.source)
    # Where nothing merges there is nothing to refuse.
    assert tomepass.explain(model, r=0, example_inputs=pixels()).ok


def test_writing_into_some_tokens_is_refused() -> None:
    class WrittenTo(Block):
        """Some tokens are written to in place."""

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            x[:, 3:5].mul_(0.5)
            return x

    report = tomepass.explain(make(blocks=[WrittenTo] * 2), r=4, example_inputs=pixels())
    (refused,) = report.refused
    assert "aten.mul_ writes in place" in refused.reason
    assert refused.block == 0
    assert "test_sweep.py:" in str(refused.source)


def test_part_of_the_tokens_from_before_a_merge_is_refused_after_it() -> None:
    class Gated(Encoder):
        """The patches of then and of now gate the stream."""

        def forward(self, pixels: Tensor) -> Any:
            first = x = self.embed(pixels)
            for block in self.blocks:
                x = block(x)
                x = x * (x[:, 1:] * first[:, 1:]).mean(1, keepdim=True).sigmoid()
            return self.read(x)

    with pytest.raises(TomeError, match="a value from before a merge meets") as caught:
        tomepass.apply(make(Gated), r=4, example_inputs=pixels())
    assert caught.value.block == 0


@torch.no_grad()
@pytest.mark.parametrize("form", [DepthwiseConvolution, PositionsAgain, Shifted])
def test_reading_by_position_after_the_last_merge_is_exact(form: type[Block]) -> None:
    # The last block's own end comes after every attention: unmerging there loses nothing.
    model = make(blocks=[Block, Block, form], start=0, readout="mean")
    for name, parameter in model.named_parameters():
        if name == "positions":
            parameter.zero_()
    x = duplicates()
    merged = tomepass.apply(model, r=[8, 6, 4], example_inputs=x)(x)
    assert relative_error(merged, model(x)) < LOSSLESS


# ---- the graph -------------------------------------------------------------------------------


class Rerun(fx.Interpreter):
    """Compares every node's metadata with what the node computes on fake tensors."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "output":
            return result
        ours, theirs = pytree.tree_leaves(n.meta["val"]), pytree.tree_leaves(result)
        stale = n.meta.get("tensor_meta")
        assert not hasattr(stale, "shape") or stale.shape == theirs[0].shape, n
        for a, b in zip(ours, theirs, strict=True):
            if isinstance(b, Tensor):
                described = [(tuple(t.shape), t.dtype, t.device, t.stride()) for t in (a, b)]
                assert str(described[0]) == str(described[1]), n.format_node()
        return result


@pytest.mark.parametrize(
    ("family", "door"),
    at_hand(
        itertools.product(CORE, (exported, compiled)),
        [("clip_vision", compiled)],
        [f"{family}-{door}" for family in CORE for door in ("export", "dynamo")],
    ),
)
def test_metadata_is_what_a_rerun_gives(family: str, shared_models: Any, door: Any) -> None:
    graph = door(shared_models[family], make_inputs(family))
    module = rewritten(graph, ToMe([9, 0, 7]))
    module.graph.lint()
    assert len(calls(module, match)) == 2
    with graph.fake_mode:
        Rerun(module).run(*(n.meta["val"] for n in module.graph.find_nodes(op="placeholder")))


def test_every_inserted_node_knows_the_models_source_line() -> None:
    graph = exported(make(), {"pixels": pixels()})
    for node in rewritten(graph, ToMe(4)).graph.nodes:
        if getattr(node.target, "namespace", "") == "tome":
            assert "encoders.py" in node.meta["stack_trace"], node


def test_the_captured_graph_stays_as_it_is(shared_models: Any) -> None:
    graph = exported(shared_models["deit"], make_inputs("deit"))
    before = graph.module.print_readable(print_output=False)
    values = {n.name: n.meta.get("val") for n in graph.graph.nodes}
    rewritten(graph, ToMe(9))
    assert graph.module.print_readable(print_output=False) == before
    for node in graph.graph.nodes:
        assert node.meta.get("val") is values[node.name]


def test_the_graph_holds_what_the_plan_says_and_no_more(shared_models: Any) -> None:
    graph = exported(shared_models["ijepa"], make_inputs("ijepa"))
    module = rewritten(graph, ToMe([0, 9, 5]))
    assert [n.args[1] for n in calls(module, match)] == [9, 5]
    assert [n.args[3] for n in calls(module, merge)] == [55, 50]
    # No bias until the first merge; none after the last attention.
    assert len(calls(module, log_size)) == 1
    assert len(calls(module, weighted_mean)) == 1
    assert not calls(module, unmerge)
    assert not calls(module, torch.ops.aten.mean.dim)


def test_without_proportional_attention_nothing_is_added_to_the_scores(shared_models: Any) -> None:
    graph = exported(shared_models["vit"], make_inputs("vit"))
    assert not calls(rewritten(graph, ToMe(9, prop_attn=False)), log_size)
    assert len(calls(rewritten(graph, ToMe(9)), log_size)) == 2


def test_an_all_true_mask_goes_and_its_arithmetic_with_it() -> None:
    aten = torch.ops.aten

    class Masked(nn.Module):
        def __init__(self, threshold: int) -> None:
            super().__init__()
            self.encoder, self.threshold = Encoder(depth=2), threshold
            for block in self.encoder.blocks:
                block.attention.attend = self.attend

        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = (torch.arange(q.shape[2]) >= self.threshold)[None, None, None, :]
            mask = mask.expand(q.shape[0], 1, q.shape[2], -1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        def forward(self, pixels: Tensor) -> Any:
            return self.encoder(pixels)

    graph = exported(make(Masked, threshold=0), {"pixels": pixels()})
    assert calls(graph.module, aten.arange.default)
    module = rewritten(graph, ToMe(4))
    assert not calls(module, aten.arange.default)
    assert not calls(module, aten.ge.Scalar)
    # r=0 leaves even that as it was.
    assert calls(rewritten(graph, ToMe(0)), aten.arange.default)
    hiding = exported(make(Masked, threshold=1), {"pixels": pixels()})
    # Made anew in each attention, it is one mask all the same.
    (stream,) = plan_graph(hiding, ToMe(4)).streams
    assert stream.padding is not None


def test_dumped_graphs_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOMEPASS_DUMP", str(tmp_path / "dump"))
    graph = exported(make(), {"pixels": pixels()})
    rewritten(graph, ToMe(4))
    rewritten(graph, ToMe(2))
    files = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert files == ["00_before.txt", "01_after.txt", "02_before.txt", "03_after.txt"]
    before, after = ((tmp_path / "dump" / name).read_text() for name in files[:2])
    assert "torch.ops.tome.match" not in before
    assert "torch.ops.tome.match.default" in after


def test_families_are_all_here() -> None:
    assert set(REFERENCES) < set(FAMILIES)
