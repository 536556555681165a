"""Methods that keep another number of tokens for each image: ATS, Threshold and A-ViT."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import plain
import pytest
import torch
import torch.utils._pytree as pytree
from depth import at_hand, in_turn
from families import PARTS
from table import ROWS
from torch import Tensor, fx
from zoo import make_inputs, make_model, output_of, relative_error

import tomepass
from tomepass import ToMe, TomeBackend, TomeError
from tomepass.calibration.thresholds import calibrate_tau
from tomepass.capture.captured import read_state
from tomepass.methods import ATS, AViT, Method, Prune, Threshold
from tomepass.ops.attending.attention_to import attention_to
from tomepass.ops.padding import PADDED
from tomepass.planning.plan_graph import plan_graph
from tomepass.proof.replay import Recorder
from tomepass.rewriting.sweep import _Sweep

R = [5, 0, 9]
METHODS: dict[str, Method] = {
    "ats": ATS(R),
    "threshold": Threshold(R, tau=0.7),
    "threshold_unweighted": Threshold(R, tau=0.7, prop_attn=False),
    "avit": AViT(R, gamma=1.0, beta=-0.9),
}
every_adaptive = pytest.mark.parametrize("name", METHODS)
# A class token, none (pooled), registers and a mean, a mean alone, a bias, softmax written out,
# rotary positions, tokens of its own at the end, another tower, a padding mask, dense outputs.
KINDS = (
    *("vit", "siglip_vision", "dinov2_registers", "ijepa", "beit", "vit_eager", "dinov3"),
    *("yolos", "clip", "bert_padded", "dpt", "masked_images"),
)


def tensors(outputs: Any) -> list[Tensor]:
    found = pytree.tree_leaves(outputs)
    return [v for v in found if isinstance(v, Tensor) and v.is_floating_point()]


def same_bits(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- places out of use -----------------------------------------------------------------------


def out_of_use(x: Tensor, size: Tensor) -> Tensor:
    """Other values where nothing is."""
    return torch.where(size.unsqueeze(-1) == 0, 5 - 3 * x.flip(2), x)


def in_use(x: Tensor, size: Tensor) -> Tensor:
    """Another value in the last token of those there are."""
    place = torch.arange(size.shape[1]).where(size > 0, -1).argmax(-1, keepdim=True)
    last = torch.zeros_like(size).scatter(1, place, 1.0).bool()
    return torch.where(last.unsqueeze(-1), 5 - 3 * x.flip(2), x)


def overwritten(
    model: Any, inputs: dict[str, Tensor], method: Method, fill: Callable[..., Tensor] | None
) -> tuple[list[Tensor], Tensor]:
    """What a model makes of tokens that were overwritten after every reduction, and which of
    those places were out of use."""
    capture = tomepass.apply(model, method, example_inputs=inputs).captured(inputs).capture
    planned = plan_graph(capture.graph, method)
    sweep = _Sweep(capture.graph, planned, keep_short=False, keep_sizes=True)
    module, merges = sweep.run().module, sweep.streams[0]
    graph = module.graph
    holes = []
    for epoch, index in enumerate(merges.blocks):
        tokens = sweep.new[merges.planned.stream.blocks[index].merge_at]
        size = merges.sizes[epoch + 1]
        assert size is not None
        with graph.inserting_after(size if tokens < size else tokens):
            if fill is not None:
                filled = graph.call_function(fill, (tokens, size))
                others = [n for n in tokens.users if n is not filled]
                for reader in others:
                    reader.replace_input_with(tokens, filled)
        holes.append(size)
    (output,) = graph.find_nodes(op="output")
    output.args = ((*output.args[0], *holes),)
    values = [*read_state(model, capture), *pytree.tree_leaves(inputs)]
    found = fx.Interpreter(fx.GraphModule(module, graph)).run(*values)
    empty = torch.cat([(size == 0).sum(1) for size in found[-len(holes) :]])
    return tensors(found[: -len(holes)]), empty


@pytest.mark.parametrize(
    ("family", "name"),
    at_hand(
        [(f, n) for i, f in enumerate(KINDS) for j, n in enumerate(METHODS) if (i + j) % 2 == 0],
        [
            ("siglip_vision", "threshold"),
            ("beit", "ats"),
            ("dinov3", "threshold_unweighted"),
            ("bert_padded", "avit"),
        ],
    ),
)
@torch.no_grad()
def test_places_out_of_use_are_left_out_exactly(family: str, name: str, shared_models: Any) -> None:
    model, inputs, method = shared_models[family], make_inputs(family, 3), METHODS[name]
    theirs, empty = overwritten(model, inputs, method, None)
    assert int(empty.sum()) > 0
    assert all(output.isfinite().all() for output in theirs)
    ours, _ = overwritten(model, inputs, method, out_of_use)
    assert same_bits(ours, theirs)
    others, _ = overwritten(model, inputs, method, in_use)
    assert not same_bits(others, theirs)


@torch.no_grad()
def test_nor_do_they_pay_attention_where_it_is_written_out() -> None:
    model, inputs = make_model("siglip_vision"), make_inputs("siglip_vision", 3)
    model.set_attn_implementation("eager")
    theirs, empty = overwritten(model, inputs, ATS(R), None)
    ours, _ = overwritten(model, inputs, ATS(R), out_of_use)
    assert int(empty.sum()) > 0
    assert same_bits(ours, theirs)


@pytest.mark.deep
@torch.no_grad()
def test_attention_is_read_as_it_is_paid_without_the_sizes(shared_models: Any) -> None:
    model, inputs = shared_models["bert_padded"], make_inputs("bert_padded", 3)
    method = ToMe([4, 0, 4], importance="class_attention", prop_attn=False)
    applied = tomepass.apply(model, method, example_inputs=inputs).captured(inputs)
    assert applied.graph is not None
    recorder = Recorder(applied.graph, [attention_to])
    recorder.run(*read_state(model, applied.capture), *pytree.tree_leaves(inputs))
    sizes = recorder.calls[-1].args[2]
    assert sizes[sizes >= PADDED].unique().tolist() == [1.0]
    assert int((sizes < PADDED).sum()) > 0


@pytest.mark.parametrize(
    ("name", "dtype"),
    at_hand(
        [*((name, torch.bfloat16) for name in METHODS), ("ats", torch.float16)],
        [("threshold", torch.bfloat16)],
    ),
)
@torch.no_grad()
def test_in_low_precision_too(name: str, dtype: torch.dtype) -> None:
    model = make_model("siglip_vision").to(dtype)
    inputs = {"pixel_values": make_inputs("siglip_vision", 3)["pixel_values"].to(dtype)}
    theirs, empty = overwritten(model, inputs, METHODS[name], None)
    ours, _ = overwritten(model, inputs, METHODS[name], out_of_use)
    assert int(empty.sum()) > 0
    assert all(output.isfinite().all() for output in theirs)
    assert same_bits(ours, theirs)


@pytest.mark.parametrize(
    ("family", "name"), in_turn(["siglip_vision", "masked_images", "yolos"], METHODS)
)
@torch.no_grad()
def test_outputs_keep_their_shape_and_are_finite(
    family: str, name: str, shared_models: Any
) -> None:
    model, inputs = shared_models[family], make_inputs(family, 3)
    merged = tomepass.apply(model, METHODS[name], example_inputs=inputs)
    for ours, theirs in zip(tensors(merged(**inputs)), tensors(model(**inputs)), strict=True):
        assert ours.shape == theirs.shape
        assert ours.isfinite().all()


@every_adaptive
@torch.no_grad()
def test_no_original_token_is_found_in_a_place_out_of_use(name: str, shared_models: Any) -> None:
    model, inputs = shared_models["vit"], make_inputs("vit", 4)
    method = METHODS[name].replace(trace_source=True)
    merged = tomepass.apply(model, method, example_inputs=inputs)
    source, kept = merged.source(**inputs), merged.kept(**inputs)[:, -1]
    assert [len(set(row.tolist())) for row in source] == kept.tolist()


@pytest.mark.parametrize(
    "family", at_hand(["siglip_vision", "dinov2_registers", "ijepa"], ["siglip_vision", "ijepa"])
)
@torch.no_grad()
def test_where_all_tokens_halt_one_is_left_to_read(family: str, shared_models: Any) -> None:
    model, inputs = shared_models[family], make_inputs(family, 3)
    merged = tomepass.apply(model, AViT(1, gamma=0.0, beta=30.0), example_inputs=inputs)
    (stream,) = merged.report(inputs).streams
    assert merged.kept(**inputs).tolist() == [[len(stream.protected) + 1] * 3] * 3
    assert output_of(family, merged(**inputs)).isfinite().all()


# ---- how many --------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), in_turn(PARTS, METHODS))
@torch.no_grad()
def test_the_number_kept_varies_by_image(family: str, name: str, shared_models: Any) -> None:
    model, inputs = shared_models[family], make_inputs(family, 8)
    merged = tomepass.apply(model, METHODS[name], example_inputs=inputs)
    kept = merged.kept(**inputs)
    (stream,) = merged.report(inputs).streams
    places = torch.tensor([block.tokens_out for block in stream.blocks])
    assert kept.shape == (8, 3)
    assert (kept <= places).all()
    assert (kept > len(stream.protected)).all()
    assert len(set(kept[:, -1].tolist())) > 1
    alone = {key: value[2:3] for key, value in inputs.items()}
    assert torch.equal(merged.kept(**alone), kept[2:3])


@pytest.mark.parametrize("name", ["ats", "threshold", "avit"])
@torch.no_grad()
def test_kept_counts_what_the_plain_reference_has_in_use(name: str, shared_models: Any) -> None:
    model, inputs = shared_models["dinov2_registers"], make_inputs("dinov2_registers", 4)
    method = ROWS[name].make(R)
    kept = tomepass.apply(model, method, example_inputs=inputs).kept(**inputs)
    parts = PARTS["dinov2_registers"](model, inputs)
    plan = method.plan(parts.embedded.shape[1], tuple(range(parts.protected)), 3)
    for depth in range(1, 4):
        encoded = plain.encode(
            *(parts.embedded, parts.blocks[:depth], parts.norm),
            [block.tokens_out for block in plan.blocks[:depth]],
            parts.protected,
            ROWS[name].rule,
            method.prop_attn,
            method.every_block,
        )
        assert torch.equal(kept[:, depth - 1], (encoded.size > 0).sum(1))


@torch.no_grad()
def test_kept_of_methods_without_holes_is_the_plan(shared_models: Any) -> None:
    model, inputs = shared_models["vit"], make_inputs("vit", 2)
    for method, counts in (
        (ToMe([5, 0, 9]), [60, 60, 51]),
        (Prune([0, 5]), [65, 60, 60]),
        (ATS(0), [65, 65, 65]),
        (AViT(0, gamma=0.0, beta=9.0), [65, 65, 65]),
        (Threshold(keep_rate=1.0, tau=-1.0), [65, 65, 65]),
    ):
        merged = tomepass.apply(model, method, example_inputs=inputs)
        assert merged.kept(**inputs).tolist() == [counts] * 2
        # A model that is called in between still runs its own graph.
        assert torch.equal(merged(**inputs).logits, merged(inputs["pixel_values"]).logits)


@torch.no_grad()
def test_kept_does_not_count_padding(shared_models: Any) -> None:
    model, inputs = shared_models["bert_padded"], make_inputs("bert_padded", 3)
    merged = tomepass.apply(model, Prune([4, 0, 0]), example_inputs=inputs)
    assert merged.kept(**inputs).tolist() == [[17] * 3, [20] * 3, [20] * 3]


def test_kept_of_a_model_that_is_left_alone_is_refused(shared_models: Any) -> None:
    model, inputs = shared_models["swin"], make_inputs("swin")
    with pytest.warns(UserWarning, match="left unmerged"):
        merged = tomepass.apply(model, ATS(2), example_inputs=inputs, on_unmatched="warn")
    with pytest.raises(TomeError, match="left unmerged, so no block loses a token"):
        merged.kept(**inputs)


@torch.no_grad()
def test_the_report_tells_of_the_distribution(shared_models: Any) -> None:
    model, inputs = shared_models["vit"], make_inputs("vit", 9)
    merged = tomepass.apply(model, ATS(R), example_inputs=inputs)
    report, kept = merged.kept_report(inputs), merged.kept(**inputs)
    assert (report.images, report.tokens, len(report.blocks)) == (9, 65, 3)
    assert [block.places for block in report.blocks] == [60, 60, 51]
    for block, column in zip(report.blocks, kept.unbind(1), strict=True):
        ordered = sorted(column.tolist())
        figures = (block.least, block.lower, block.median, block.upper, block.most)
        assert figures == (ordered[0], ordered[2], ordered[4], ordered[6], ordered[8])
        assert block.mean == pytest.approx(sum(ordered) / 9)
    text = str(report)
    assert "ATS(r=[5, 0, 9])" in text
    assert "tokens in use, of 65, over 9 images" in text
    assert f" {report.blocks[2].median:g} " in text
    assert report.to_dict()["method"] == {"method": "ats", **ATS(R).to_dict()}


# ---- what each does --------------------------------------------------------------------------


@pytest.mark.deep
@torch.no_grad()
def test_a_threshold_of_one_merges_what_tome_does(shared_models: Any) -> None:
    for family in ("vit", "siglip_vision"):
        model, inputs = shared_models[family], make_inputs(family, 3)
        merged, tome = (
            output_of(family, tomepass.apply(model, method, example_inputs=inputs)(**inputs))
            for method in (Threshold(R, tau=1.0), ToMe(R))
        )
        torch.testing.assert_close(merged, tome, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_lower_threshold_keeps_fewer(shared_models: Any) -> None:
    model, inputs = shared_models["vit"], make_inputs("vit", 4)
    kept = [
        tomepass.apply(model, Threshold([3], tau=tau), example_inputs=inputs).kept(**inputs)[:, 0]
        for tau in (-1.0, 0.5, 0.8, 0.95, 1.0)
    ]
    assert all((a <= b).all() for a, b in itertools.pairwise(kept))
    assert kept[0].tolist() == [33] * 4  # only odd positions and the class token are left
    assert kept[-1].tolist() == [62] * 4


@torch.no_grad()
def test_scores_add_up_in_blocks_that_drop_nothing(shared_models: Any) -> None:
    model, inputs = shared_models["vit"], make_inputs("vit", 2)
    # sigmoid(0) is a half: two blocks make a whole, the second of which loses no token.
    method = AViT([1, 0, 1], gamma=0.0, beta=0.0)
    kept = tomepass.apply(model, method, example_inputs=inputs).kept(**inputs)
    assert kept.tolist() == [[64, 2, 2]] * 2


# ---- doors -----------------------------------------------------------------------------------


# tests/methods/test_generated_code.py compiles what they add to a graph.
@pytest.mark.deep
@pytest.mark.parametrize("name", ["ats", "threshold"])  # pruned with holes, merged with holes
@torch.no_grad()
def test_kernels_compute_what_eager_does(name: str, shared_models: Any) -> None:
    model, inputs = shared_models["siglip_vision"], make_inputs("siglip_vision", 3)
    eager = tomepass.apply(model, METHODS[name], example_inputs=inputs)(**inputs)
    compiled = torch.compile(model, backend=TomeBackend(METHODS[name]))(**inputs)
    ours, theirs = (output_of("siglip_vision", each) for each in (compiled, eager))
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.deep
@pytest.mark.parametrize(
    ("name", "compiler"),
    # Biases are merged alike.
    at_hand(
        [*((name, "aot_eager") for name in METHODS), ("threshold", "inductor")],
        [("threshold", "aot_eager")],
    ),
)
@torch.no_grad()
def test_compiled_position_biases_are_those_of_eager(
    name: str, compiler: str, shared_models: Any
) -> None:
    model, inputs = shared_models["beit"], make_inputs("beit", 3)
    merged = tomepass.apply(model, METHODS[name], example_inputs=inputs)
    compiled = torch.compile(merged, fullgraph=True, backend=compiler)
    ours, theirs = (output_of("beit", m(**inputs)) for m in (compiled, merged))
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize("name", at_hand(METHODS, ["threshold"]))
def test_gradients_are_finite(name: str) -> None:
    model, inputs = make_model("beit"), make_inputs("beit", 2)
    merged = tomepass.apply(model, METHODS[name], example_inputs=inputs)
    output_of("beit", merged(**inputs)).square().sum().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) > 10
    assert all(gradient.isfinite().all() for gradient in found)


# ---- calibration -----------------------------------------------------------------------------


@pytest.mark.deep
@torch.no_grad()
def test_calibration_finds_the_threshold_of_a_mean_share(shared_models: Any) -> None:
    model = shared_models["vit"]
    batches = [make_inputs("vit", 4, seed)["pixel_values"] for seed in (1, 2)]
    method = Threshold([2, 2, 2], tau=0.1)
    tau = calibrate_tau(model, iter(batches), 0.6, method)
    assert tau == calibrate_tau(model, batches, 0.6, method)

    def share(tau: float) -> float:
        merged = tomepass.apply(model, method.replace(tau=tau), example_inputs=batches[0])
        return float(torch.cat([merged.kept(x)[:, -1] for x in batches]).float().mean()) / 65

    assert 0.6 <= share(tau) < 0.65
    assert share(tau - 1e-4) < 0.6


def test_calibration_says_what_cannot_be_reached(shared_models: Any) -> None:
    model, inputs = shared_models["vit"], make_inputs("vit")
    with pytest.raises(ValueError, match=r"rate=0.95: .* keeps from 0.\d+ to 0.815 of these"):
        calibrate_tau(model, [inputs], 0.95, Threshold(4))
    with pytest.raises(ValueError, match="batches: expected one or more, got none"):
        calibrate_tau(model, [], 0.5, Threshold(4))
    with pytest.raises(ValueError, match="rate: expected a number"):
        calibrate_tau(model, [inputs], 0.0, Threshold(4))
    with pytest.raises(TypeError, match="method must be a Threshold, got ATS"):
        calibrate_tau(model, [inputs], 0.5, ATS(4))  # type: ignore[arg-type]


# ---- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold(tau=1.5), "tau: expected a number in"),
        (lambda: Threshold(tau=float("nan")), "tau: expected a number in"),
        (lambda: Threshold(tau="high"), "tau: expected a number, got 'high'"),
        (lambda: AViT(gamma="5"), "gamma: expected a number, got '5'"),
        (lambda: AViT(gamma=float("inf")), "gamma: expected a number in"),
        (lambda: AViT(beta=float("nan")), "beta: expected a number in"),
        (lambda: AViT(epsilon=-0.1), "epsilon: expected a number in"),
        (lambda: AViT(prop_attn=True), "prop_attn=True does nothing with AViT"),
        (lambda: ATS(prop_attn=True), "prop_attn=True does nothing with ATS"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(
    make: Callable[[], Method], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_defaults_are_those_of_the_papers() -> None:
    assert repr(AViT(8)) == "AViT(r=8)"
    assert (AViT().gamma, AViT().beta, AViT().epsilon) == (5.0, -10.0, 0.01)
    assert repr(ATS(8, protected=(0,))) == "ATS(r=8, protected=(0,))"
    assert repr(Threshold(8, tau=0.5)) == "Threshold(r=8, tau=0.5)"
