"""The applied module: the model's own interface, with merged tokens behind it."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from depth import at_hand
from encoders import Causal, make, near, pixels
from torch import Tensor, nn
from zoo import (
    CORE,
    FAMILIES,
    REFERENCES,
    make_inputs,
    make_model,
    make_vit,
    output_of,
    relative_error,
    scaled_up,
)

import tomepass
from tomepass import ToMe, TomeError
from tomepass.handover import applied

# Where the interface is tested and not the merges, one merge will do.
FEW = [8]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The inputs of every capture made during the test, as they are made."""
    made: list[dict[str, Any]] = []
    capture = applied.capture_module

    def counted(model: nn.Module, call: dict[str, Any], forward: str = "forward") -> Any:
        made.append(call)
        return capture(model, call, forward)

    monkeypatch.setattr(applied, "capture_module", counted)
    return made


@pytest.fixture(scope="module")
def merged() -> Any:
    """A ViT merged with r=8, for tests that leave it as it is."""
    return tomepass.apply(make_model("vit"), r=8)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Nothing about the module tree changes in the block: classes, code, hooks, parameters."""

    def seen() -> list[Any]:
        parts = [
            (name, part, type(part), type(part).forward, sorted(part.__dict__))
            for name, part in model.named_modules()
        ]
        hooks = [
            [*part._forward_hooks, *part._forward_pre_hooks, *part._backward_hooks]
            for part in model.modules()
        ]
        return [parts, hooks, [(n, id(p), p.data_ptr()) for n, p in model.named_parameters()]]

    before = seen()
    yield
    assert seen() == before


# What it computes


@pytest.mark.parametrize(
    ("name", "r", "prop_attn"),
    at_hand(
        [
            *((name, 8, True) for name in REFERENCES),
            ("vit", [10, 0, 5], True),
            ("deit_distilled", [30], True),
            ("dinov2_registers", (6, -0.5), True),
            ("vit", (9, 1.0), True),
            ("ijepa", 50, True),  # capped: at most half each time
            ("vit", 8, False),
            ("dinov2_registers", 8, False),
        ],
        # One of each form of ``r``, of each model, and one without the sizes.
        [
            ("deit_distilled", 8, True),
            ("vit", [10, 0, 5], True),
            ("dinov2_registers", (6, -0.5), True),
            ("ijepa", 50, True),
            ("vit", 8, False),
        ],
    ),
)
def test_equals_the_plain_reference(name: str, r: Any, prop_attn: bool, shared_models: Any) -> None:
    model, inputs = shared_models[name], make_inputs(name)
    merged = tomepass.apply(model, ToMe(r=r, prop_attn=prop_attn))
    with torch.no_grad():
        expected = REFERENCES[name](model, inputs["pixel_values"], r, prop_attn)
        got, unmerged = merged(**inputs).logits, model(**inputs).logits
    assert relative_error(got, expected.output) < 1e-4
    # Merging matters here, so agreeing is no accident.
    assert relative_error(unmerged, expected.output) > 1e-2
    assert [b.tokens_out for b in merged.report(inputs).blocks] == expected.counts


def test_proportional_attention_matters_here(vit: Any, images: Tensor) -> None:
    on, off = (REFERENCES["vit"](vit, images, 8, prop_attn).output for prop_attn in (True, False))
    assert relative_error(off, on) > 1e-2


@pytest.mark.parametrize(
    "family",
    at_hand(CORE, ["deit_distilled", "dinov2_registers"]),
)
def test_r_0_is_the_model_bit_for_bit_and_r_8_is_not(family: str, shared_models: Any) -> None:
    model, inputs = shared_models[family], make_inputs(family)
    whole, merged = tomepass.apply(model, r=0), tomepass.apply(model, r=8)
    with torch.no_grad():
        expected = model(**inputs)
        same, other = whole(**inputs), merged(**inputs)
    assert type(same) is type(other) is type(expected)
    assert list(same) == list(other) == list(expected)
    for field, value in expected.items():
        assert torch.equal(same[field], value), field
        assert other[field].shape == value.shape, field
    assert relative_error(output_of(family, other), output_of(family, expected)) > 1e-2
    report = merged.report(inputs)
    assert report.protected == FAMILIES[family].streams[0].protected
    assert [b.r for b in report.blocks] == [8, 8, 8]


def test_r_is_16_by_default(vit: Any, images: Tensor) -> None:
    merged = tomepass.apply(vit)
    assert merged.method == ToMe(r=16)
    assert [b.tokens_out for b in merged.report(images).blocks] == [49, 33, 17]


def test_one_block_works(images: Tensor) -> None:
    model = make_vit(num_hidden_layers=1)
    expected = REFERENCES["vit"](model, images, 8).output
    assert relative_error(tomepass.apply(model, r=8)(images).logits, expected) < 1e-4


# How it is called


def test_any_batch_size_takes_one_capture(vit: Any, captures: list[Any]) -> None:
    merged = tomepass.apply(vit, r=FEW)
    assert len(captures) == 1  # made ahead, from the config
    for batch in (1, 2, 7):
        pixels = make_inputs("vit", batch)["pixel_values"]
        expected = REFERENCES["vit"](vit, pixels, FEW).output
        assert relative_error(merged(pixels).logits, expected) < 1e-4
    assert len(captures) == 1


def test_a_first_call_with_one_image_serves_all_batch_sizes(captures: list[Any]) -> None:
    model = make_model("vit")
    model.main_input_name = "unknown"  # nothing can be captured ahead
    merged = tomepass.apply(model, r=FEW)
    assert captures == []
    five = make_inputs("vit", 5)["pixel_values"]
    one = merged(five[:1]).logits
    assert relative_error(merged(five).logits[:1], one) < 1e-4
    assert len(captures) == 1


def test_a_batch_of_three_images_of_three_channels(vit: Any) -> None:
    # 3 is the channel count too: only the first dimension is the batch.
    merged = tomepass.apply(vit, r=FEW, example_inputs=make_inputs("vit", 3))
    pixels = make_inputs("vit", 4)["pixel_values"]
    assert relative_error(merged(pixels).logits[:3], merged(pixels[:3]).logits) < 1e-4


def test_inputs_by_position_and_by_name_are_one_call(
    merged: Any, images: Tensor, captures: list[Any]
) -> None:
    by_name = merged(pixel_values=images).logits
    assert torch.equal(merged(images).logits, by_name)
    no_options = {"labels": None, "interpolate_pos_encoding": None}
    assert torch.equal(merged(images, **no_options).logits, by_name)
    assert captures == []  # it was captured before


def test_labels_give_the_loss_and_its_gradient(vit: Any, images: Tensor) -> None:
    merged, labels = tomepass.apply(vit, r=FEW), torch.tensor([3, 1])
    got = merged(images, labels=labels)
    logits = REFERENCES["vit"](vit, images, FEW).output
    expected = nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(got.loss, expected, rtol=1e-4, atol=0)
    (ours,) = torch.autograd.grad(got.loss, [vit.classifier.weight])
    (theirs,) = torch.autograd.grad(expected, [vit.classifier.weight])
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize(
    "name",
    at_hand(
        ["vit", "deit_distilled", "dinov2_registers", "clip_vision_projection", "ast"],
        ["clip_vision_projection"],
    ),
)
def test_options_of_the_call(name: str, shared_models: Any) -> None:
    """return_dict, hidden states and attentions, as the model gives them."""
    model, inputs = shared_models[name], make_inputs(name)
    as_tuple = {**inputs, "return_dict": False}
    merged = tomepass.apply(model, r=FEW, example_inputs=as_tuple)
    with torch.no_grad():
        expected, got = model(**as_tuple), merged(**as_tuple)
        assert type(got) is type(expected) is tuple
        assert [v.shape for v in got] == [v.shape for v in expected]

        asked = {**inputs, "output_hidden_states": True, "output_attentions": True}
        expected, got = model(**asked), merged(**asked)
    assert list(got) == list(expected)
    # Fused attention has no weights to give: transformers returns () or None, and so do we.
    assert not expected.attentions
    assert got.attentions == expected.attentions
    states = zip(got.hidden_states, expected.hidden_states, strict=True)
    assert all(ours.shape == theirs.shape for ours, theirs in states)
    assert torch.equal(got.hidden_states[0], expected.hidden_states[0])  # nothing merged yet


def test_hidden_states_are_those_of_the_merged_tokens(vit: Any, images: Tensor) -> None:
    got = tomepass.apply(vit, r=[20])(images, output_hidden_states=True).hidden_states[-1]
    distinct = [len(image.unique(dim=0)) for image in got]
    assert distinct == [45, 45]


def test_attention_weights_come_back_for_the_original_tokens(vit: Any, images: Tensor) -> None:
    fused = tomepass.apply(vit, r=FEW)(images).logits
    vit.set_attn_implementation("eager")
    with torch.no_grad():
        plain = vit(images, output_attentions=True).attentions
        same = tomepass.apply(vit, r=0)(images, output_attentions=True).attentions
        merged = tomepass.apply(vit, r=FEW)(images, output_attentions=True)
    assert all(torch.equal(a, b) for a, b in zip(same, plain, strict=True))
    assert torch.equal(merged.attentions[0], plain[0])  # nothing has merged yet
    for ours, theirs in zip(merged.attentions, plain, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours.sum(-1)))
    assert relative_error(merged.logits, fused) < 1e-5


def test_each_resolution_is_captured_once(vit: Any, captures: list[Any]) -> None:
    merged, whole = tomepass.apply(vit, r=FEW), tomepass.apply(vit, r=0)
    captures.clear()
    for size in (48, 40, 48, 40):
        pixels = torch.randn(2, 3, size, size)
        with torch.no_grad():
            expected = vit(pixels, interpolate_pos_encoding=True).logits
            assert torch.equal(whole(pixels, interpolate_pos_encoding=True).logits, expected)
            merged(pixels, interpolate_pos_encoding=True)
        blocks = merged.report({"pixel_values": pixels, "interpolate_pos_encoding": True}).blocks
        assert blocks[0].tokens_in == (size // 4) ** 2 + 1
    assert len(captures) == 4  # two resolutions, two modules


def test_prepare_captures_ahead(vit: Any, captures: list[Any]) -> None:
    merged = tomepass.apply(vit, r=FEW)
    captures.clear()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    assert merged.prepare((images, labels)) is merged
    assert len(captures) == 1
    merged(images, labels=labels)
    merged.prepare({"pixel_values": images, "labels": labels})
    assert len(captures) == 1


def test_captures_follow_the_mode(captures: list[Any]) -> None:
    model = make_vit(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    merged = tomepass.apply(model, r=FEW)
    images = make_inputs("vit")["pixel_values"]
    calm = merged(images).logits
    model.train()  # on the model itself
    assert merged.training
    assert not torch.equal(merged(images).logits, merged(images).logits)  # dropout
    merged.eval()
    assert not model.training
    assert torch.equal(merged(images).logits, calm)
    assert len(captures) == 2
    model.vit.train()  # one part alone
    assert not torch.equal(merged(images).logits, merged(images).logits)
    assert len(captures) == 2  # all that reads its mode is in training, as before


@pytest.mark.deep
def test_casts_and_captures_follow_the_dtype(vit: Any, captures: list[Any]) -> None:
    merged = tomepass.apply(vit, r=FEW)
    images = make_inputs("vit")["pixel_values"]
    with torch.no_grad():
        exact = merged.double()(images.double()).logits
        for cast, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16)):
            assert getattr(merged, cast)() is merged
            assert merged.dtype == vit.dtype == dtype
            got = merged(images.to(dtype)).logits
            assert got.dtype == dtype
            assert relative_error(got, exact) < 0.3
        merged.to(torch.float64)
        assert relative_error(merged(images.double()).logits, exact) < 0.3
    assert len(captures) == 4


@pytest.mark.parametrize("ahead", at_hand([True, False], [False]))
def test_a_capture_does_not_remember_autocast_or_inference_mode(vit: Any, ahead: bool) -> None:
    images = make_inputs("vit")["pixel_values"]
    expected = tomepass.apply(vit, r=FEW)(images).logits
    merged = tomepass.apply(vit, r=FEW)
    if not ahead:
        merged._captures.clear()
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            merged(images)
    got = merged(images).logits
    assert torch.equal(got, expected)
    got.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert merged(images).logits.dtype == torch.bfloat16


# Inside torch.compile


def test_a_compiled_region_keeps_the_merges_in_one_graph(vit: Any, images: Tensor) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph

    merged = tomepass.apply(vit, r=FEW)
    fast = torch.compile(merged, fullgraph=True, backend=keep)
    assert torch.equal(fast(images).logits, merged(images).logits)
    (graph,) = graphs
    assert sum(node.target is torch.ops.tome.match.default for node in graph.graph.nodes) == 1


@pytest.mark.parametrize("fullgraph", at_hand([True, False], [False]))
def test_an_unprepared_call_in_a_compiled_region_is_refused(
    vit: Any, images: Tensor, fullgraph: bool
) -> None:
    merged = tomepass.apply(vit, r=FEW)
    fast = torch.compile(merged, fullgraph=fullgraph, backend="eager")
    call = {"pixel_values": images, "labels": torch.tensor([1, 2])}
    with pytest.raises(TomeError, match=r"merged\.tome\.prepare\(inputs\)"):
        fast(**call)
    merged.prepare(call)
    torch._dynamo.reset()
    torch.testing.assert_close(fast(**call).loss, merged(**call).loss)


@pytest.mark.deep
def test_compiled_with_a_dynamic_batch(vit: Any) -> None:
    merged = tomepass.apply(vit, r=FEW)
    fast = torch.compile(merged, fullgraph=True, dynamic=True, backend="eager")
    for batch in (2, 5, 3):
        pixels = make_inputs("vit", batch)["pixel_values"]
        assert torch.equal(fast(pixels).logits, merged(pixels).logits)


# tests/handover/test_backend.py has the same merges in the same model from the other door.
@pytest.mark.xdist_group("generated code")
def test_inductor_compiles_it(images: Tensor) -> None:
    merged = tomepass.apply(make_vit(num_hidden_layers=2), r=8)
    with torch.no_grad():
        fast = torch.compile(merged, fullgraph=True)
        assert relative_error(fast(images).logits, merged(images).logits) < 1e-4


# Being the model


def test_the_model_stays_as_it_is(vit: Any, images: Tensor) -> None:
    with torch.no_grad():
        before = vit(images).logits
        with unchanged(vit):
            tomepass.apply(vit, r=FEW)(images)
            assert torch.equal(vit(images).logits, before)


def test_parameters_are_the_models_own(vit: Any) -> None:
    merged = tomepass.apply(vit, r=FEW)
    assert list(merged.state_dict()) == list(vit.state_dict())
    assert dict(merged.named_parameters()).keys() == dict(vit.named_parameters()).keys()
    for ours, theirs in zip(merged.parameters(), vit.parameters(), strict=True):
        assert ours is theirs
    assert list(merged.named_buffers()) == list(vit.named_buffers())


@pytest.mark.deep
def test_it_answers_for_the_model(vit: Any) -> None:
    merged = tomepass.apply(vit, r=FEW)
    assert isinstance(merged, nn.Module)
    assert type(merged).__name__ == "ViTForImageClassification"
    assert merged.config is vit.config
    assert merged.device == vit.device
    assert merged.dtype == vit.dtype
    assert merged.num_parameters() == vit.num_parameters()
    assert merged.classifier is vit.classifier
    assert "ToMe(r=[8])" in repr(merged)
    assert "(classifier): Linear" in repr(merged)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = merged.no_such_thing


def test_changes_to_the_parameters_are_seen(vit: Any, images: Tensor) -> None:
    merged, other = tomepass.apply(vit, r=FEW), make_model("vit", seed=1)
    expected = tomepass.apply(other, r=FEW)(images).logits
    called = torch.func.functional_call(merged, dict(other.named_parameters()), (images,))
    assert torch.equal(called.logits, expected)
    assert not torch.equal(merged(images).logits, expected)
    merged.load_state_dict(other.state_dict())
    assert torch.equal(merged(images).logits, expected)


@pytest.mark.deep
def test_new_parameter_objects_are_seen(vit: Any, images: Tensor) -> None:
    merged, other = tomepass.apply(vit, r=FEW), make_model("vit", seed=1)
    expected = tomepass.apply(other, r=FEW)(images).logits
    merged.load_state_dict(other.state_dict(), assign=True)
    assert merged.classifier.weight.data_ptr() == other.classifier.weight.data_ptr()
    assert torch.equal(merged(images).logits, expected)
    vit.classifier = nn.Linear(32, 4)
    assert merged(images).logits.shape == (2, 4)


def _pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def _saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [_pickled, _saved, copy.deepcopy])
def test_copies_stand_on_their_own(copied: Any, vit: Any, images: Tensor) -> None:
    merged = tomepass.apply(vit, r=FEW)
    merged.note = "kept"
    expected = merged(images).logits
    twin = copied(merged)
    assert twin.method == merged.method
    assert twin.note == "kept"
    assert torch.equal(twin(images).logits, expected)
    with torch.no_grad():
        twin.classifier.bias.add_(1.0)
    torch.testing.assert_close(twin(images).logits, expected + 1)
    assert torch.equal(merged(images).logits, expected)


def test_inside_another_module(vit: Any, images: Tensor) -> None:
    merged = tomepass.apply(vit, r=FEW)
    outer = nn.Sequential(nn.Identity(), merged)
    expected = merged(images).logits
    assert torch.equal(outer(images).logits, expected)
    assert list(outer.state_dict()) == [f"1.{name}" for name in vit.state_dict()]
    assert sum(1 for _ in outer.parameters()) == sum(1 for _ in vit.parameters())
    outer.train()
    assert vit.training
    outer.eval()
    assert not vit.training
    merged.training = True  # as nn.Module's own methods set it
    assert vit.training
    merged.training = False
    other = nn.Sequential(nn.Identity(), make_model("vit", seed=1))
    outer.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(outer(images).logits, tomepass.apply(other[1], r=FEW)(images).logits)
    outer.to(torch.float64)
    assert vit.dtype == torch.float64
    assert outer(images.double()).logits.dtype == torch.float64


def test_save_pretrained_saves_the_model(merged: Any, images: Tensor, tmp_path: Path) -> None:
    merged.save_pretrained(tmp_path)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(images).logits, merged.original(images).logits)


# The source map, and short outputs


@pytest.mark.parametrize("name", at_hand(REFERENCES, ["deit_distilled", "ijepa"]))
def test_source_is_the_references_map_and_pure(name: str, shared_models: Any) -> None:
    model, inputs = shared_models[name], make_inputs(name, 3)
    merged = tomepass.apply(model, ToMe(r=8, trace_source=True))
    expected = REFERENCES[name](model, inputs["pixel_values"], 8)
    before = merged(**inputs).logits
    source = merged.source(**inputs)
    assert source.dtype == torch.int64
    assert torch.equal(source, expected.source)
    assert torch.equal(merged.source(inputs["pixel_values"]), source)
    assert torch.equal(merged(**inputs).logits, before)
    sizes = torch.zeros_like(expected.size).scatter_add_(1, source, torch.ones(source.shape))
    assert torch.equal(sizes, expected.size)


def test_source_of_nothing_merged_is_every_tokens_own_place(vit: Any, images: Tensor) -> None:
    source = tomepass.apply(vit, ToMe(r=0, trace_source=True)).source(images)
    assert torch.equal(source, torch.arange(65).expand(2, -1))


def test_source_needs_to_be_asked_for(merged: Any, images: Tensor) -> None:
    with pytest.raises(TomeError, match="trace_source=True"):
        merged.source(images)


def test_outputs_merged_are_short(images: Tensor) -> None:
    model = transformers.ViTModel(make_model("vit").config, add_pooling_layer=False)
    scaled_up(model)
    expected = REFERENCES["vit"](_headed(model), images, 8)
    short = tomepass.apply(model, r=8, outputs="merged")(images, output_hidden_states=True)
    assert relative_error(short.last_hidden_state, expected.hidden) < 1e-4
    assert [state.shape[1] for state in short.hidden_states] == [65, 57, 49, 41]
    full = tomepass.apply(model, r=8)(images).last_hidden_state
    index = expected.source[..., None].expand(-1, -1, 32)
    assert relative_error(full, expected.hidden.gather(1, index)) < 1e-4


def _headed(model: Any) -> Any:
    # The reference of a classifier reads two attributes.
    headed = nn.Module()
    headed.vit, headed.classifier = model, nn.Identity()
    return headed


# Refusals


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"r": -1}, ValueError),
        ({"r": 8.0}, TypeError),
        ({"r": True}, TypeError),
        ({"r": [1, 2, 3, 4]}, ValueError),
        ({"r": (8, 1.5)}, ValueError),
        ({"r": 8, "method": ToMe(r=8)}, TypeError),
        ({"method": 8}, TypeError),
        ({"r": 8, "outputs": "short"}, ValueError),
        ({"r": 8, "on_unmatched": "ignore"}, ValueError),
    ],
)
def test_wrong_arguments_are_refused(
    vit: Any, arguments: dict[str, Any], error: type[Exception]
) -> None:
    with unchanged(vit), pytest.raises(error):
        tomepass.apply(vit, **arguments)


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        ((torch.zeros(2, 3, 48, 48),), r"48\*48"),
        ((torch.zeros(3, 32, 32),), r"float32\[3, 32, 32\]"),
        ((torch.zeros(2, 1, 32, 32),), r"channel"),
        ((torch.zeros(2, 3, 32, 32, dtype=torch.int64), torch.tensor([0.5, 1])), "int64"),
        ((), "no tensor"),
    ],
)
def test_wrong_inputs_are_refused(merged: Any, inputs: Any, complaint: str) -> None:
    with unchanged(merged.original), pytest.raises(TomeError, match=complaint):
        merged(*inputs)


def test_a_dtype_that_no_kernel_has_is_refused(vit: Any) -> None:
    with pytest.raises(TomeError, match="Float8"):
        tomepass.apply(vit.to(torch.float8_e4m3fn), r=8)


def test_an_input_twice_or_too_many_is_a_type_error(merged: Any, images: Tensor) -> None:
    with pytest.raises(TypeError, match="twice"):
        merged(images, pixel_values=images)
    with pytest.raises(TypeError, match="at most"):
        merged(images, *range(20))
    with pytest.raises(TypeError, match="must be a tensor, a tuple"):
        merged.prepare(7)


def test_models_that_are_no_encoder_are_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        tomepass.apply("google/vit", r=8)  # type: ignore[arg-type]
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(TomeError, match="no attention"):
        tomepass.apply(mlp, r=8, example_inputs=torch.zeros(2, 3, 4))


def test_merging_twice_is_refused(vit: Any) -> None:
    merged = tomepass.apply(vit, r=8)
    with pytest.raises(TomeError, match="already merged"):
        tomepass.apply(merged, r=4)
    for door in (tomepass.apply, tomepass.explain):
        with pytest.raises(TomeError, match="already compiled"):
            door(torch.compile(vit), r=4)


def test_warn_leaves_the_model_whole_with_one_warning() -> None:
    model, images = make(blocks=[near(Causal)]), pixels()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = tomepass.apply(
            model, ToMe(r=8, trace_source=True), on_unmatched="warn", example_inputs=images
        )
        got = merged(images)
        merged(images[:1])
    (warning,) = [w for w in caught if "left unmerged" in str(w.message)]
    assert "causal attention" in str(warning.message)
    assert torch.equal(got, model(images))
    with pytest.raises(TomeError, match="left unmerged"):
        merged.source(images)


# Explain


def test_explain_reports_a_mismatch_and_neither_raises_nor_warns() -> None:
    model = make(blocks=[near(Causal)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = tomepass.explain(model, r=8, example_inputs=pixels())
    assert not report.ok
    assert "causal" in report.refused[0].reason


def test_explain_takes_an_applied_module_as_it_is(merged: Any) -> None:
    report = tomepass.explain(merged)
    assert report.ok
    assert report.method == ToMe(r=8)
    assert tomepass.explain(merged, r=4).method == ToMe(r=4)


def test_explain_refuses_wrong_arguments(vit: Any) -> None:
    with pytest.raises(TypeError, match="not both"):
        tomepass.explain(vit, ToMe(r=8), r=8)
    with pytest.raises(ValueError, match="outputs"):
        tomepass.explain(vit, r=8, outputs="short")  # type: ignore[arg-type]


# What the documentation promises first


@pytest.mark.deep
@pytest.mark.usefixtures("inductor")
def test_the_first_example_runs_as_written(tmp_path: Path) -> None:
    make_vit(num_hidden_layers=2).save_pretrained(tmp_path)
    x = make_inputs("vit")["pixel_values"]

    from transformers import ViTForImageClassification

    from tomepass import tome_backend

    model = ViTForImageClassification.from_pretrained(tmp_path).eval()

    merged = tomepass.apply(model, r=16)
    logits = merged(pixel_values=x).logits
    fast = torch.compile(merged, fullgraph=True)
    assert relative_error(fast(pixel_values=x).logits, logits) < 1e-4

    fast = torch.compile(model, backend=tome_backend)
    assert relative_error(fast(x).logits, logits) < 1e-4
    fast = torch.compile(model, backend="tome", options={"r": 8})
    named = fast(x).logits
    fast = torch.compile(model, backend=tomepass.TomeBackend(tomepass.ToMe(r=8), inner="eager"))
    assert relative_error(fast(x).logits, named) < 1e-4
    assert relative_error(named, logits) > 1e-2

    assert "r=16" in str(tomepass.explain(model, r=16))
    report = tomepass.check(model, x, r=16)
    assert report.ok, str(report)
