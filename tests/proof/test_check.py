"""The harness passes what is right, and each of its lines fails on what that line is for."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from depth import at_hand
from encoders import Encoder, make, pixels
from torch import Tensor, fx, nn
from zoo import make_inputs

import tomepass
from tomepass import CheckReport, ToMe, TomeError
from tomepass.graphs.nodes import FUSED
from tomepass.handover.merged import MergedModel
from tomepass.ops.attending.log_size import log_size
from tomepass.ops.matching import match as match_module
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge
from tomepass.proof import check as equivalence
from tomepass.proof import duplicates

pytestmark = pytest.mark.usefixtures("captured_once")

IDENTITY = "1. r=0 is the original, bit for bit"
MATCHES = "2. matches against the reference"
MERGES = "merges against the reference"
ATTENTIONS = "attentions against the reference"
COMPILED = "3. compiled against merged eager"
REPLAYED = "the same merges replayed"
FLOAT64 = "replayed: distance from float64"
LOSSLESS = "4. lossless on duplicate tokens"
SAME_BITS = "5. the same bits again"
NEIGHBOURS = "whatever an image's neighbours"
ALL = [IDENTITY, MATCHES, MERGES, ATTENTIONS, COMPILED, LOSSLESS, SAME_BITS, NEIGHBOURS]


def names(report: CheckReport, passed: bool | None) -> set[str]:
    """The lines with a verdict."""
    return {line.name.strip() for line in report.lines if line.passed is passed}


def line(report: CheckReport, name: str) -> equivalence.CheckLine:
    """One line of a report, by name."""
    (found,) = [x for x in report.lines if x.name.strip() == name]
    return found


@functools.cache
def small() -> nn.Module:
    """One model, captured once, for all checks that do not ask for another."""
    model: nn.Module = make(readout="mean")
    return model


def checked(model: nn.Module | None = None, **options: Any) -> CheckReport:
    """A check of a small encoder, eager unless said otherwise."""
    options = {"inner": "eager", "r": [7, 6], **options}
    inputs = options.pop("inputs", None)
    model = small() if model is None else model
    return tomepass.check(model, pixels(3) if inputs is None else inputs, **options)


# ---- what is right passes --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "inner"),
    at_hand(
        [
            ("vit", "aot_eager"),
            ("deit_distilled", "eager"),
            ("dinov2_registers", "eager"),
            ("clip_vision_projection", "eager"),
            ("ijepa", "aot_eager"),
            ("ast", "eager"),
        ],
        [("dinov2_registers", "eager")],
    ),
)
def test_families_pass(name: str, inner: str, shared_models: Any) -> None:
    report = tomepass.check(shared_models[name], make_inputs(name, batch=3), r=9, inner=inner)
    assert report.ok, str(report)
    assert [x.name.strip() for x in report.lines] == ALL
    assert all(x.passed for x in report.lines), str(report)


@pytest.mark.deep
def test_inductor_passes(shared_models: Any) -> None:
    report = tomepass.check(shared_models["vit"], make_inputs("vit", batch=3), r=[9, 9])
    assert all(x.passed for x in report.lines), str(report)
    assert 0 < line(report, COMPILED).figure < 1e-5


@pytest.mark.deep
def test_bfloat16_passes_with_its_merges_replayed() -> None:
    model = make(readout="mean").bfloat16()
    report = checked(model, inputs=pixels(3).bfloat16(), inner="aot_eager")
    assert report.ok, str(report)
    assert names(report, None) == {COMPILED}
    ratio = line(report, FLOAT64)
    assert ratio.passed
    assert ratio.figure == pytest.approx(1.0)
    assert line(report, MERGES).figure > 1e-4


@pytest.mark.deep
def test_without_proportional_attention_the_reference_has_none_either() -> None:
    report = checked(r=None, method=ToMe([7, 6], prop_attn=False))
    assert report.ok
    assert line(report, ATTENTIONS).note == "1 plain attentions"
    assert names(report, None) == {LOSSLESS}
    assert "proportional attention is off" in line(report, LOSSLESS).note


@pytest.mark.deep
def test_where_nothing_merges_there_is_little_to_check() -> None:
    report = checked(r=0)
    assert report.ok
    assert line(report, MATCHES).note.startswith("0 matches")
    assert names(report, None) == {LOSSLESS}


@pytest.mark.deep
def test_a_model_that_hardly_attends_is_blind_to_duplicates() -> None:
    model = make(readout="mean")
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.zero_()
    report = checked(model)
    assert report.ok
    lossless = line(report, LOSSLESS)
    assert lossless.passed is None
    assert lossless.note.startswith("blind here: without proportional attention the error is")


@pytest.mark.deep
def test_any_kind_of_inputs_and_an_applied_model_can_be_checked() -> None:
    model = make(readout="mean")
    for inputs in ((pixels(3),), {"pixels": pixels(3)}, pixels(1)):
        assert checked(model, inputs=inputs).ok
    applied = tomepass.apply(model, r=[5], example_inputs=pixels())
    report = checked(applied, r=None)
    assert report.ok
    assert report.method == ToMe([5])


# ---- each line can fail ----------------------------------------------------------------------


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Edits every node of one operator in the graph under test."""

    def edit_all(target: Any, edit: Callable[[fx.Node], None]) -> None:
        honest = equivalence.apply

        def apply(*args: Any, **kwargs: Any) -> MergedModel:
            merged = honest(*args, **kwargs)
            graph = merged.captured(kwargs["example_inputs"]).graph
            assert graph is not None
            nodes = graph.graph.find_nodes(op="call_function", target=target)
            assert nodes
            for node in nodes:
                edit(node)
            graph.graph.eliminate_dead_code()
            graph.recompile()
            return merged

        monkeypatch.setattr(equivalence, "apply", apply)

    return edit_all


def test_a_missing_size_in_a_merge_fails(sabotage: Any) -> None:
    sabotage(merge, lambda node: node.update_arg(1, None))
    assert names(checked(), False) == {MERGES}


def test_missing_proportional_attention_fails(sabotage: Any) -> None:
    sabotage(FUSED, lambda node: node.update_arg(3, None))
    assert names(checked(), False) == {ATTENTIONS}


def test_proportional_attention_nobody_asked_for_fails(sabotage: Any) -> None:
    def scaled(node: fx.Node) -> None:
        size = node.args[0]
        with node.graph.inserting_before(node):
            twice = node.graph.call_function(torch.ops.aten.mul.Tensor, (size, size))
        node.update_arg(0, twice)

    sabotage(log_size, scaled)
    assert names(checked(), False) == {ATTENTIONS}


def test_an_unprotected_class_token_fails(sabotage: Any) -> None:
    sabotage(match, lambda node: node.update_arg(2, []))
    assert names(checked(), False) == {MATCHES}


def test_a_metric_of_something_else_fails(sabotage: Any) -> None:
    def values_for_keys(node: fx.Node) -> None:
        (attention,) = [u for u in node.args[0].users if u.target is FUSED]  # type: ignore[union-attr]
        node.update_arg(0, attention.args[2])

    sabotage(match, values_for_keys)
    assert names(checked(), False) == {MATCHES}


def test_a_wrong_tie_break_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def last_first(similarity: Tensor) -> Tensor:
        return honest(similarity.flip(-1)).flip(-1)

    honest = match_module.rank
    monkeypatch.setattr(match_module, "rank", last_first)
    assert names(checked(), False) == {MATCHES}


@pytest.mark.deep
def test_merging_the_least_similar_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = match_module.rank
    monkeypatch.setattr(match_module, "rank", lambda similarity: honest(-similarity))
    assert MATCHES in names(checked(), False)


def test_a_rewrite_that_is_not_the_identity_at_r0_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = equivalence.rewrite

    def rewrite(*args: Any, **kwargs: Any) -> Any:
        rewritten = honest(*args, **kwargs)
        graph = rewritten.module.graph
        (output,) = graph.find_nodes(op="output")
        (result,) = output.args[0]
        with graph.inserting_before(output):
            nearly = graph.call_function(torch.ops.aten.mul.Tensor, (result, 1.0000002))
        output.args = ((nearly,),)
        rewritten.module.recompile()
        return rewritten

    monkeypatch.setattr(equivalence, "rewrite", rewrite)
    report = checked()
    assert names(report, False) == {IDENTITY}
    assert 0 < line(report, IDENTITY).figure < 1e-5


def test_a_merge_that_loses_something_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = duplicates.plan_graph

    def plan_graph(graph: Any, method: ToMe) -> Any:
        return honest(graph, method.replace(prop_attn=False))

    monkeypatch.setattr(duplicates, "plan_graph", plan_graph)
    report = checked()
    assert names(report, False) == {LOSSLESS}
    assert line(report, LOSSLESS).figure > 1e-3


def compiler(change: Callable[[Tensor, list[Any]], Tensor]) -> Callable[..., Any]:
    """An inner backend that changes the first output, given the graph's inputs too."""

    def compile_graph(gm: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            first, *rest = gm(*inputs)
            return (change(first, list(inputs)), *rest)

        return run

    return compile_graph


def test_a_compiler_that_is_off_fails() -> None:
    report = checked(inner=compiler(lambda out, _: out * 1.001))
    assert names(report, False) == {COMPILED}
    assert line(report, COMPILED).figure == pytest.approx(1e-3, rel=0.1)
    assert checked(inner=compiler(lambda out, _: out * (1 + 1e-6))).ok


def test_a_compiler_that_never_repeats_itself_fails() -> None:
    count = itertools.count()
    report = checked(inner=compiler(lambda out, _: out + 1e-6 * next(count)))
    assert names(report, False) == {SAME_BITS}
    assert names(report, None) == {NEIGHBOURS}


def test_a_compiler_that_mixes_images_fails() -> None:
    def mixed(out: Tensor, inputs: list[Any]) -> Tensor:
        images = next(v for v in inputs if isinstance(v, Tensor) and v.shape[1:] == (3, 24, 24))
        return out + 1e-6 * images.mean()

    for images in (3, 1):
        report = checked(inner=compiler(mixed), inputs=pixels(images))
        assert names(report, False) == {NEIGHBOURS}


@pytest.mark.deep
def test_a_compiler_that_is_off_in_bfloat16_fails_though_merges_may_flip() -> None:
    model, inputs = make(readout="mean").bfloat16(), pixels(3).bfloat16()
    report = checked(model, inputs=inputs, inner=compiler(lambda out, _: out * 1.1))
    assert names(report, False) == {FLOAT64}
    assert line(report, FLOAT64).figure > 2


# ---- ties ------------------------------------------------------------------------------------


class OnTokens(Encoder):
    """Takes tokens; the first block's keys see four of their channels alone."""

    def __init__(self) -> None:
        super().__init__(start=0, readout="mean")
        with torch.no_grad():
            self.blocks[0].attention.k.weight[:, 4:] = 0

    def embed(self, pixels: Tensor) -> Tensor:
        return pixels


def with_a_tie(images: int = 3) -> Tensor:
    """Tokens of which, in the first image, 1 and 3 are alike to 0's key and not to each other."""
    tokens = torch.randn(images, 20, 16, generator=torch.Generator().manual_seed(3))
    first = tokens[0]
    first[3] = first[1]
    # A norm sees the same mean and variance: only channels the keys do not read change places.
    first[3, 4:] = first[1, 4:].flip(0)
    first[0, :4] = first[1, :4]
    first[0, 4:] = first[1, 4:].roll(3)
    return tokens


def nudge(module: fx.GraphModule) -> None:
    """Moves token 1's key, as match sees it, by less than what counts as a tie."""
    for node in module.graph.find_nodes(op="call_function", target=match):
        keys = node.args[0]
        if keys.meta["example_value" if "example_value" in keys.meta else "val"].shape[2] != 20:
            continue
        with module.graph.inserting_before(node):
            moved = module.graph.call_function(_moved, (keys,))
        node.update_arg(0, moved)
    module.recompile()


def _moved(keys: Tensor) -> Tensor:
    keys = keys.clone()
    keys[:, :, 1] += 1e-3 * keys[:, :, 1].flip(-1)
    return keys


def tie_breaker(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A compiler whose rounding breaks a tie the other way, and that changes its result."""

    def compile_graph(gm: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        nudge(gm)

        def run(*inputs: Any) -> Any:
            first, *rest = gm(*inputs)
            return (change(first), *rest)

        return run

    return compile_graph


@pytest.mark.deep
def test_a_tie_that_rounding_breaks_the_other_way_is_no_failure() -> None:
    model = make(OnTokens)
    inputs = with_a_tie()
    report = checked(model, inputs=inputs, r=[1, 4], inner=tie_breaker(lambda out: out))
    assert report.ok, str(report)
    note = line(report, COMPILED).note
    assert note == "1 of 3 images tie within rounding: see the next line"
    assert line(report, REPLAYED).passed
    # The tie is what made the difference.
    assert checked(model, inputs=inputs[1:], r=[1, 4], inner=tie_breaker(lambda out: out)).ok
    assert REPLAYED not in names(checked(model, inputs=inputs, r=[1, 4]), True)


@pytest.mark.deep
def test_a_tie_excuses_no_other_image() -> None:
    def second_off(out: Tensor) -> Tensor:
        return torch.cat([out[:1], out[1:2] * 1.01, out[2:]])

    report = checked(make(OnTokens), inputs=with_a_tie(), r=[1, 4], inner=tie_breaker(second_off))
    assert COMPILED in names(report, False)


def test_a_tie_excuses_nothing_but_its_merges() -> None:
    def first_off(out: Tensor) -> Tensor:
        return torch.cat([out[:1] * 1.01, out[1:]])

    report = checked(make(OnTokens), inputs=with_a_tie(), r=[1, 4], inner=tie_breaker(first_off))
    assert line(report, COMPILED).passed
    assert names(report, False) == {REPLAYED}


# ---- the report ------------------------------------------------------------------------------


def test_a_failed_report_says_which_line_and_by_how_much() -> None:
    report = checked(inner=compiler(lambda out, _: out * 1.01))
    assert not report.ok
    text = str(report)
    assert "FAILED 3. compiled against merged eager: 1.0e-02, allowed 1.0e-04" in text
    assert "All checks pass" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert len(re.findall(r"\bpass\b", text)) == 7


def test_a_passed_report_says_so() -> None:
    text = str(checked())
    assert "All checks pass." in text
    assert "FAIL" not in text
    assert "pixels float32[3, 3, 24, 24]" in text
    assert f"tomepass {tomepass.__version__}" in text


def test_a_report_converts_to_json() -> None:
    report = checked()
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is True
    assert data["method"] == ToMe([7, 6]).to_dict()
    assert [x["name"].strip() for x in data["lines"]] == ALL


def test_each_line_is_announced_before_it_runs() -> None:
    seen: list[str] = []
    checked(progress=seen.append)
    assert seen == [IDENTITY, MATCHES, COMPILED, LOSSLESS, SAME_BITS]


# ---- bad input -------------------------------------------------------------------------------


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(TomeError, match="eval mode") as caught:
        checked(make().train())
    assert caught.value.advice == "call model.eval() first"


def test_a_model_that_cannot_be_merged_raises() -> None:
    with pytest.raises(TomeError, match="no attention"):
        checked(make(blocks=[]))


def test_a_missing_backend_is_said_before_the_work() -> None:
    seen: list[str] = []
    with pytest.raises(TomeError, match="knows no backend 'warp'"):
        checked(inner="warp", progress=seen.append)
    assert not seen


def test_r_and_method_together_are_an_error() -> None:
    with pytest.raises(TypeError, match="not both"):
        checked(method=ToMe(3))


@pytest.mark.deep
def test_checking_does_not_use_up_what_dynamo_allows_others() -> None:
    model = make(readout="mean")
    for _ in range(3):
        checked(model)
    merged = tomepass.apply(model, r=[7, 6], example_inputs=pixels())
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        compiled = torch.compile(merged, backend="eager", fullgraph=True)
        assert torch.equal(compiled(pixels()), merged(pixels()))
