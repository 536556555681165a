"""The backend of torch.compile: merges whole towers, or says in full why not."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import reference_models
import torch
import torch._dynamo.config
import torch._inductor.config
from depth import at_hand
from encoders import Causal, DecomposedBias, make, near, pixels
from module_names import blocks_of
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from zoo import REFERENCES, make_inputs, make_model, make_vit, output_of, relative_error

import tomepass
from tomepass import ToMe, TomeBackend, TomeError, reference, tome_backend
from tomepass.handover.compiling import inner as compilers
from tomepass.handover.compiling.inner import resolve_inner

MATCH = torch.ops.tome.match.default


class Inner:
    """An inner backend that runs the graph as it is, and remembers every call."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.keywords: list[dict[str, Any]] = []

    def __call__(
        self, graph: fx.GraphModule, inputs: Sequence[Any], **keywords: Any
    ) -> Callable[..., Any]:
        self.graphs.append(graph)
        self.keywords.append(keywords)
        return graph

    @property
    def merges(self) -> list[int]:
        """Matches in each graph."""
        return [len(g.graph.find_nodes(op="call_function", target=MATCH)) for g in self.graphs]


@pytest.fixture
def inner() -> Inner:
    return Inner()


@pytest.fixture(scope="module")
def model() -> Any:
    """A ViT that the tests leave as it is: transformers hooks it when asked for hidden states."""
    return make_model("vit")


@pytest.fixture
def small() -> Any:
    """An encoder of two blocks, where the interface is tested and not the model."""
    return make()


@pytest.fixture
def few() -> Tensor:
    """Images for it."""
    return pixels()


@pytest.fixture(scope="module")
def expected(model: Any) -> Tensor:
    """Its logits for the ``images`` at r=8, by the plain reference."""
    images = make_inputs("vit")["pixel_values"]
    return REFERENCES["vit"](model, images, 8).output.detach()


def eager(r: Any = 8, **options: Any) -> TomeBackend:
    return TomeBackend(ToMe(r=r, **options), inner="eager")


def refusal(compiled: Any, *args: Any, **kwargs: Any) -> str:
    """What Dynamo says where the backend raised a TomeError."""
    with pytest.raises(BackendCompilerFailed) as failed:
        compiled(*args, **kwargs)
    assert isinstance(failed.value.inner_exception, TomeError)
    # torch wraps every backend's error: what ours says must come through in full.
    assert str(failed.value.inner_exception) in str(failed.value)
    return str(failed.value)


# What it computes


@pytest.mark.parametrize(
    ("name", "r", "prop_attn"),
    at_hand(
        [
            *((name, 8, True) for name in REFERENCES),
            ("ijepa", [10, 0, 5], True),
            ("vit", (6, -0.5), True),
            ("deit_distilled", 8, False),
        ],
        [
            ("dinov2_registers", 8, True),
            ("deit_distilled", 8, False),
        ],
    ),
)
def test_equals_the_plain_reference(name: str, r: Any, prop_attn: bool, inner: Inner) -> None:
    model, inputs = make_model(name), make_inputs(name)
    backend = TomeBackend(ToMe(r=r, prop_attn=prop_attn), inner=inner)
    with torch.no_grad():
        expected = REFERENCES[name](model, inputs["pixel_values"], r, prop_attn)
        got = torch.compile(model, backend=backend, fullgraph=True)(**inputs).logits
    assert relative_error(got, expected.output) < 1e-4
    counts = [expected.source.shape[1], *expected.counts]
    assert inner.merges == [sum(a > b for a, b in itertools.pairwise(counts))]


# tests/rewriting/test_sweep.py and tests/methods/test_generated_code.py say so of others.
@pytest.mark.deep
@pytest.mark.parametrize("name", ["dinov2", "clip_vision_projection", "vit_msn", "ast"])
def test_both_doors_agree(name: str) -> None:
    model, inputs = make_model(name), make_inputs(name)
    ours = torch.compile(model, backend=eager())(**inputs)
    theirs = tomepass.apply(model, r=8)(**inputs)
    assert relative_error(output_of(name, ours), output_of(name, theirs)) < 1e-6


def test_r_0_is_the_model_bit_for_bit(model: Any, images: Tensor) -> None:
    with torch.no_grad():
        got = torch.compile(model, backend=eager(0))(images).logits
        assert torch.equal(got, model(images).logits)


def test_outputs_merged_are_short(vit: Any, images: Tensor) -> None:
    backend = dataclasses.replace(eager(), outputs="merged")
    states = torch.compile(vit, backend=backend)(images, output_hidden_states=True)
    assert [s.shape[1] for s in states.hidden_states] == [65, 57, 49, 41]
    applied = tomepass.apply(vit, r=8, outputs="merged")(images, output_hidden_states=True)
    for ours, theirs in zip(states.hidden_states, applied.hidden_states, strict=True):
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.deep
def test_autocast(model: Any, images: Tensor, expected: Tensor) -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.compile(model, backend=eager())(images).logits
        assert torch.equal(got, tomepass.apply(model, r=8)(images).logits)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, expected) < 0.1


@pytest.mark.parametrize("name", ["eager", pytest.param("inductor", marks=pytest.mark.deep)])
def test_freezing(name: str, model: Any, images: Tensor, expected: Tensor) -> None:
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(model, backend=TomeBackend(ToMe(r=8), inner=name))
        assert relative_error(compiled(images).logits, expected) < 1e-4


def test_freezing_as_an_option_is_refused_since_it_would_do_nothing(
    small: Any, few: Tensor
) -> None:
    backend = TomeBackend(inner_options={"freezing": True})
    with torch.no_grad():
        assert "TORCHINDUCTOR_FREEZING=1" in refusal(torch.compile(small, backend=backend), few)


# tests/handover/test_merged.py has the same merges in the same model from the other door.
@pytest.mark.xdist_group("generated code")
def test_inductor_makes_code_of_it(images: Tensor) -> None:
    model = make_vit(num_hidden_layers=2)
    with torch.no_grad():
        expected = REFERENCES["vit"](model, images, 8).output
        compiled = torch.compile(model, backend=TomeBackend(ToMe(r=8)))
        assert relative_error(compiled(images).logits, expected) < 1e-4


# As a value


def test_it_is_frozen_hashable_and_compares_by_its_fields() -> None:
    backend = TomeBackend(ToMe(r=8), inner="eager", inner_options={"b": 1, "a": 2})
    same = TomeBackend(ToMe(r=8), inner="eager", inner_options=(("a", 2), ("b", 1)))
    assert backend == same
    assert hash(backend) == hash(same)
    assert backend != eager()
    assert TomeBackend() == tome_backend
    assert [f.name for f in dataclasses.fields(backend)] == [
        "method",
        "inner",
        "inner_options",
        "on_unmatched",
        "outputs",
    ]
    for field in dataclasses.fields(backend):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(backend, field.name, getattr(backend, field.name))
    assert repr(eager()).startswith("TomeBackend(method=ToMe(r=8), inner='eager'")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"method": 8}, TypeError),
        ({"inner": 8}, TypeError),
        ({"on_unmatched": "ignore"}, ValueError),
        ({"outputs": "short"}, ValueError),
        ({"method": ToMe(r=8, trace_source=True)}, TomeError),
    ],
)
def test_wrong_fields_are_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        TomeBackend(**arguments)


def test_equal_backends_share_a_compilation(model: Any, images: Tensor, inner: Inner) -> None:
    # Dynamo asks whether two backends are equal before it reuses a graph.
    for _ in range(2):
        torch.compile(model, backend=TomeBackend(ToMe(r=8), inner=inner))(images)
    assert inner.merges == [3]


# Its name, mode and options


def test_it_is_found_by_name(model: Any, images: Tensor, expected: Tensor) -> None:
    (point,) = entry_points(group="torch_dynamo_backends", name="tome")
    assert point.load() is tome_backend
    compiled = torch.compile(model, backend="tome", options={"r": 8, "inner": "eager"})
    assert relative_error(compiled(images).logits, expected) < 1e-4


def test_options_are_fields_of_the_backend_and_of_its_method(
    small: Any, few: Tensor, inner: Inner
) -> None:
    options = {"r": [4], "prop_attn": False, "protected": (0, 1), "inner": inner}
    torch.compile(small, backend=tome_backend, options=options)(few)
    assert inner.merges == [1]
    (match,) = inner.graphs[0].graph.find_nodes(op="call_function", target=MATCH)
    assert list(match.args[1:]) == [4, [0, 1]]
    assert tome_backend.with_options(options) == TomeBackend(
        ToMe(r=[4], prop_attn=False, protected=(0, 1)), inner=inner
    )
    assert tome_backend.with_options({"method": ToMe(r=4)}).method == ToMe(r=4)
    assert tome_backend.method == ToMe(r=16)


def test_an_unknown_option_is_refused_and_the_valid_ones_listed(small: Any, few: Tensor) -> None:
    compiled = torch.compile(small, backend="tome", options={"rate": 8})
    said = refusal(compiled, few)
    assert "['rate']" in said
    for field in (*dataclasses.fields(TomeBackend), *dataclasses.fields(ToMe)):
        assert (field.name in said) == field.init


def test_trace_source_is_refused_as_an_option(small: Any, few: Tensor) -> None:
    compiled = torch.compile(small, backend="tome", options={"trace_source": True})
    assert "trace_source is not available" in refusal(compiled, few)


def test_mode_and_options_reach_the_inner_backend(small: Any, few: Tensor, inner: Inner) -> None:
    options = {"a": 1, "nested": {"b": "c"}}
    backend = TomeBackend(ToMe(r=8), inner=inner, inner_options=options)
    assert hash(backend) == hash(dataclasses.replace(backend))
    torch.compile(small, backend=backend, mode="max-autotune")(few)
    assert inner.keywords == [{"options": options, "mode": "max-autotune"}]


def test_inductor_gets_the_modes_options_and_its_own(
    small: Any, few: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches = []

    def compile_fx(graph: Any, inputs: Any, config_patches: Any = None) -> Any:
        patches.append(config_patches)
        return graph

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    for mode in ("reduce-overhead", "max-autotune", None):
        torch._dynamo.reset()
        backend = TomeBackend(ToMe(r=8), inner_options={"freezing": False})
        torch.compile(small, backend=backend, mode=mode)(few)
    assert patches == [
        torch._inductor.list_mode_options(mode) | {"freezing": False}
        for mode in ("reduce-overhead", "max-autotune", "default")
    ]


@pytest.mark.deep
def test_an_inner_backend_without_modes_runs_all_the_same(
    model: Any, images: Tensor, expected: Tensor
) -> None:
    compiled = torch.compile(model, backend=eager(), mode="reduce-overhead")
    assert relative_error(compiled(images).logits, expected) < 1e-4


def test_openvino_is_not_given_what_it_would_silently_run_eagerly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = []
    stand_in = lambda gm, inputs, **options: compiled.append(inputs)  # noqa: E731
    monkeypatch.setattr(compilers, "_registered", lambda name: stand_in)
    compile_graph = resolve_inner("openvino", {})
    compile_graph(fx.symbolic_trace(nn.Identity()), [torch.ones(2)])
    assert len(compiled) == 1
    with pytest.raises(TomeError, match=r"(?s)no bfloat16 tensors.*keep the model in float32"):
        compile_graph(fx.symbolic_trace(nn.Identity()), [torch.ones(2, dtype=torch.bfloat16)])
    assert len(compiled) == 1


@pytest.mark.parametrize("name", ["openvino", "tensorrt"])
def test_an_inner_backend_that_is_not_installed(
    name: str, small: Any, few: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("openvino", "openvino.torch", "torch_tensorrt"):
        monkeypatch.setitem(sys.modules, module, None)
    said = refusal(torch.compile(small, backend=TomeBackend(inner=name)), few)
    assert f"pip install 'tomepass[{name}]'" in said


def test_an_inner_backend_whose_libraries_are_missing(
    small: Any, few: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torch_tensorrt raises no ImportError where there is no driver."""
    (tmp_path / "torch_tensorrt.py").write_text("raise Exception('no driver found')")
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    said = refusal(torch.compile(small, backend=TomeBackend(inner="tensorrt")), few)
    assert "needs torch_tensorrt, which cannot be imported: no driver found" in said
    assert "pip install 'tomepass[tensorrt]'" in said


def test_an_unknown_inner_backend(small: Any, few: Tensor) -> None:
    said = refusal(torch.compile(small, backend=TomeBackend(inner="nope")), few)
    assert "knows no backend 'nope'" in said
    for name in ("aot_eager", "eager", "inductor", "openvino", "tensorrt"):
        assert name in said


# Graphs without attention


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3)).softmax(-1)


def test_graphs_without_attention_go_through_untouched(inner: Inner) -> None:
    received = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        received.append(graph)
        return TomeBackend(inner=inner)(graph, inputs)

    network, x = Convolutions(), torch.randn(2, 3, 16, 16)
    compiled = torch.compile(network, backend=backend, dynamic=True)
    assert torch.equal(compiled(x), network(x))
    compiled(torch.randn(4, 3, 20, 20))  # sizes are not fixed either
    assert inner.graphs == received
    assert len(received) == 1


# Graph breaks


class Broken(nn.Module):
    """A ViT with a graph break at one place."""

    def __init__(self, model: Any, place: str) -> None:
        super().__init__()
        self.model, self.place = model, place

    def forward(self, x: Tensor) -> Tensor:
        vit, place = self.model.vit, self.place
        first, second, third = blocks_of(vit)
        if place == "start":
            torch._dynamo.graph_break()
        x = vit.embeddings(x)
        if place == "tower":
            torch._dynamo.graph_break()
        x = first(x)
        if place == "middle":
            torch._dynamo.graph_break()
        x = vit.layernorm(third(second(x)))[:, 0]
        if place == "head":
            torch._dynamo.graph_break()
        return self.model.classifier(x)


@pytest.mark.parametrize(("place", "merges"), [("start", [3]), ("head", [3, 0])])
def test_breaks_outside_the_tower_do_not_matter(
    place: str, merges: list[int], model: Any, images: Tensor, expected: Tensor, inner: Inner
) -> None:
    broken = Broken(model, place)
    got = torch.compile(broken, backend=TomeBackend(ToMe(r=8), inner=inner))(images)
    assert relative_error(got, expected) < 1e-4
    assert inner.merges == merges


@pytest.mark.parametrize("place", ["tower", "middle"])
def test_a_fragment_that_starts_in_a_tower_is_refused(
    place: str, model: Any, images: Tensor
) -> None:
    said = refusal(torch.compile(Broken(model, place), backend=eager()), images)
    assert "starts inside the model, after a graph break" in said
    assert "protected=(0,)" in said
    assert "modeling_vit.py" in said
    assert "block 0" in said


def test_a_fragment_merges_where_its_protected_tokens_are_given(
    model: Any, images: Tensor, expected: Tensor, inner: Inner
) -> None:
    backend = TomeBackend(ToMe(r=8, protected=(0,)), inner=inner)
    whole = torch.compile(Broken(model, "tower"), backend=backend)(images)
    assert relative_error(whole, expected) < 1e-4
    assert inner.merges == [0, 3]


@pytest.mark.deep
def test_tokens_are_whole_again_at_a_break_in_a_tower(
    model: Any, images: Tensor, inner: Inner
) -> None:
    backend = TomeBackend(ToMe(r=8, protected=(0,)), inner=inner)
    with torch.no_grad():
        got = torch.compile(Broken(model, "middle"), backend=backend)(images)
        vit = model.vit
        blocks = reference_models.vit_blocks(vit)
        first = reference_models.encode(vit.embeddings(images), blocks[:1], nn.Identity(), 8, 1)
        tokens = reference.unmerge(first.hidden, first.source)
        rest = reference_models.encode(tokens, blocks[1:], vit.layernorm, 8, 1)
        wanted = model.classifier(rest.hidden[:, 0])
    assert relative_error(got, wanted) < 1e-4
    assert inner.merges == [1, 2]


# Dynamic shapes


@pytest.mark.parametrize("dynamic", at_hand([True, None], [None]))
def test_one_graph_serves_all_batch_sizes(dynamic: bool | None, model: Any, inner: Inner) -> None:
    backend = TomeBackend(ToMe(r=8), inner=inner)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    for batch in (2, 5, 7):
        pixels = make_inputs("vit", batch)["pixel_values"]
        if dynamic is None:
            torch._dynamo.mark_dynamic(pixels, 0)
        wanted = REFERENCES["vit"](model, pixels, 8).output
        assert relative_error(compiled(pixels).logits, wanted) < 1e-4
    assert inner.merges == [3]


def test_another_resolution_is_another_graph(inner: Inner) -> None:
    model = make_vit(num_hidden_layers=1)
    backend = TomeBackend(ToMe(r=8), inner=inner)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    merged = tomepass.apply(model, r=8)
    for size in (40, 32, 40, 32):
        pixels = torch.randn(2, 3, size, size)
        got = compiled(pixels, interpolate_pos_encoding=True).logits
        wanted = merged(pixels, interpolate_pos_encoding=True).logits
        assert relative_error(got, wanted) < 1e-4
    assert inner.merges == [1, 1]


# Refusals


def test_merging_twice_is_refused(small: Any, few: Tensor) -> None:
    merged = tomepass.apply(small, r=8, example_inputs=few)
    assert "already merged" in refusal(torch.compile(merged, backend=eager()), few)


@pytest.mark.deep
@torch.no_grad()
def test_without_a_method_graphs_are_handed_over_as_they_are(
    model: Any, images: Tensor, inner: Inner
) -> None:
    merged = tomepass.apply(model, r=8)
    for subject, matches in ((merged, 3), (model, 0)):
        torch._dynamo.reset()
        got = torch.compile(subject, backend=TomeBackend(None, inner=inner))(images).logits
        assert torch.equal(got, subject(images).logits)
        assert inner.merges[-1] == matches


def test_without_a_method_there_is_none_to_change() -> None:
    with pytest.raises(TomeError, match=r"unknown options \['r'\].*it has no method to change"):
        TomeBackend(None).with_options({"r": 4})
    with pytest.raises(TomeError, match="it has no method to change"):
        TomeBackend().with_options({"method": None, "r": 4})
    assert TomeBackend(None).with_options({"method": ToMe(3), "r": 4}).method == ToMe(4)
    assert TomeBackend(None).with_options({"inner": "eager"}) == TomeBackend(None, inner="eager")


@pytest.mark.deep
@torch.no_grad()
def test_written_out_attention_merges_as_fused_attention_does(vit: Any, images: Tensor) -> None:
    fused = torch.compile(vit, backend=eager())(images).logits
    vit.set_attn_implementation("eager")
    written = torch.compile(vit, backend=eager())(images).logits
    assert relative_error(written, fused) < 1e-5


def test_a_refusal_says_where_and_what_to_do() -> None:
    said = refusal(torch.compile(make(blocks=[near(DecomposedBias)]), backend=eager()), pixels())
    assert "more than one product" in said
    assert "node softmax" in said
    assert "encoders.py" in said
    assert 'attn_implementation="sdpa"' in said


def test_warn_leaves_the_model_whole_with_one_warning(
    inner: Inner,
) -> None:
    model, images = make(blocks=[near(Causal)]), pixels()
    backend = TomeBackend(ToMe(r=8), inner=inner, on_unmatched="warn")
    compiled = torch.compile(model, backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = compiled(images)
        compiled(images)
    (warning,) = [w for w in caught if "left unmerged" in str(w.message)]
    assert "causal attention" in str(warning.message)
    assert torch.equal(got, model(images))
    assert inner.merges == [0]


def test_an_unmatched_graph_is_refused_before_anything_is_compiled(
    inner: Inner,
) -> None:
    backend = TomeBackend(ToMe(r=8), inner=inner)
    refusal(torch.compile(make(blocks=[near(Causal)]), backend=backend), pixels())
    assert inner.graphs == []


# What it leaves to others


@pytest.fixture
def configs() -> Iterator[None]:
    """Dynamo's and Inductor's settings are the same before and after."""

    def settings() -> list[dict[str, Any]]:
        return [c.get_config_copy() for c in (torch._dynamo.config, torch._inductor.config)]

    before = settings()
    yield
    assert settings() == before


@pytest.mark.usefixtures("configs")
def test_the_users_settings_stay_as_they_are(small: Any, few: Tensor) -> None:
    torch.compile(small, backend=eager(), mode="max-autotune")(few)
    with pytest.raises(BackendCompilerFailed):
        torch.compile(small, backend=TomeBackend(inner="nope"))(few)


@pytest.mark.deep
def test_parameters_stay_static_inputs(model: Any, images: Tensor) -> None:
    """Otherwise CUDA graphs would copy all weights on every call."""
    from torch._inductor.compile_fx import compile_fx

    static = []

    def look(graph: Any, inputs: Any, **options: Any) -> Any:
        static.append((len(options["static_input_idxs"]), len(inputs)))
        return graph

    def inner(graph: Any, inputs: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=look)

    torch.compile(model, backend=TomeBackend(ToMe(r=8), inner=inner))(images)
    parameters = sum(1 for _ in model.parameters())
    assert static == [(parameters, parameters + 1)]
