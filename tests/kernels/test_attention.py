"""Each path of proportional attention computes exactly what the plain one does."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from depth import at_hand
from lossless import calls, errors
from torch import Tensor, fx
from zoo import COUNTS, make_inputs, make_model

import tomepass
from tomepass import ToMe, TomeBackend
from tomepass.graphs.nodes import FUSED
from tomepass.kernels import attention as attention_paths
from tomepass.kernels.attention import padded_to

pytestmark = pytest.mark.usefixtures("captured_once")

FLOAT64 = 1e-12


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device takes keys in sixteens."""
    monkeypatch.setattr(attention_paths, "padded_to", lambda device, dtype: 16)


def double(inputs: dict[str, Any]) -> dict[str, Any]:
    return pytree.tree_map(
        lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, inputs
    )


def key_counts(graph: fx.GraphModule) -> list[int]:
    return [node.args[1].meta["val"].shape[-2] for node in calls(graph, FUSED)]


# A class token, a position bias beside the sizes, padding, and pooling by attention.
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "prop_attn"),
    at_hand(
        itertools.product(["vit", "beit", "bert_padded", "siglip_vision"], [True, False]),
        [("beit", True), ("bert_padded", False)],
    ),
)
def test_padded_keys_weigh_nothing(
    name: str, prop_attn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = make_model(name).double(), double(make_inputs(name, 3))
    method = ToMe(COUNTS, prop_attn=prop_attn)
    plain = tomepass.apply(model, method, example_inputs=inputs)
    expected = plain(**inputs)
    monkeypatch.setattr(attention_paths, "padded_to", lambda device, dtype: 16)
    padded = tomepass.apply(model, method, example_inputs=inputs)
    assert max(errors(padded(**inputs), expected)) < FLOAT64
    before = key_counts(plain.captured(inputs).graph)
    after = key_counts(padded.captured(inputs).graph)
    # Every attention that carries a bias of the pass's own, and no other.
    biased = "sizes" if prop_attn or name == "bert_padded" else "table" if name == "beit" else ""
    changed = [new for new, old in zip(after, before, strict=True) if new != old]
    assert all(new % 16 == 0 for new in changed)
    assert bool(changed) == bool(biased)


@pytest.mark.usefixtures("tiles")
def test_the_figures_of_the_report_are_those_of_the_unpadded_graph() -> None:
    model, inputs = make_model("vit"), make_inputs("vit")
    report = tomepass.explain(model, r=COUNTS, example_inputs=inputs)
    assert report.paths == ("2 attentions: log(size) as a bias, keys padded to a multiple of 16",)
    assert "paths" in str(report)
    products = report.blocks[1].macs_original
    tokens = report.blocks[1].tokens_in
    assert report.blocks[1].macs < products * tokens / report.streams[0].tokens + 1


@pytest.mark.usefixtures("tiles")
@torch.no_grad()
def test_where_nothing_merges_nothing_is_padded() -> None:
    model, inputs = make_model("vit"), make_inputs("vit")
    merged = tomepass.apply(model, r=0, example_inputs=inputs)
    assert merged.report(inputs).paths == ()
    assert torch.equal(merged(**inputs).logits, model(**inputs).logits)


@pytest.mark.usefixtures("tiles")
@torch.no_grad()
def test_the_backend_takes_the_same_path() -> None:
    model, inputs = make_model("vit"), make_inputs("vit")
    seen = []

    def inner(graph: fx.GraphModule, example: list[Any]) -> Any:
        seen.append(key_counts(graph))
        return graph.forward

    torch.compile(model, backend=TomeBackend(ToMe(COUNTS), inner=inner))(**inputs)
    assert seen == [[65, 64, 64]]  # of 65, 60 and 60 tokens


def test_gradients_pass_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make_model("vit").double(), double(make_inputs("vit"))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        tomepass.apply(model, r=COUNTS, example_inputs=inputs)(**inputs).logits.sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    monkeypatch.setattr(attention_paths, "padded_to", lambda device, dtype: 16)
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("amx", [True, False])
def test_only_tiles_of_bfloat16_are_worth_padding(
    amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    cpu = torch.device("cpu")
    assert padded_to(cpu, torch.bfloat16) == (16 if amx else 1)
    assert padded_to(cpu, torch.float32) == 1
    assert padded_to(cpu, torch.float16) == 1
    assert padded_to(torch.device("cuda"), torch.bfloat16) == 1


@pytest.mark.deep
@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", at_hand(["vit", "beit", "bert_padded"], ["bert_padded"]))
def test_the_harness_compares_padded_attention_with_the_reference(name: str) -> None:
    report = tomepass.check(make_model(name), make_inputs(name, 3), r=[6, 5], inner="eager")
    assert report.ok, str(report)
    assert "proportional attentions" in str(report)


def test_the_harness_sees_padding_that_weighs_something(
    tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_paths, "_lowest", lambda dtype: 0.0)
    report = tomepass.check(make_model("vit"), make_inputs("vit", 3), r=[6, 5], inner="eager")
    failed = [line.name.strip() for line in report.lines if line.passed is False]
    assert "attentions against the reference" in failed


def test_a_path_is_not_chosen_by_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    cpu = torch.device("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert padded_to(cpu, torch.bfloat16) == 1
    assert padded_to(cpu, torch.bfloat16) == 16
