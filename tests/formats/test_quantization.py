"""Int8 and merging together: torchao before ``apply``, NNCF after the export."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import make_vit

import tomepass
from benchmarks.formats.quantization import (
    decisions,
    merged_by_openvino,
    merged_tokens,
    needed,
    with_decisions,
)
from tomepass import ToMe, TomeError
from tomepass.formats.exporting import export_unmerged
from tomepass.reading.axis import Axis, move

METHOD = ToMe([8, 6])
# The merged model's error may be larger than the unmerged one's by this much.
MARGIN = 1.1


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module")
def model() -> Any:
    return make_vit(num_hidden_layers=2)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.doors
@pytest.mark.parametrize(
    "config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
)
def test_a_model_quantised_by_torchao_merges_as_before(
    config: str, model: Any, images: Tensor
) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    small = copy.deepcopy(model)
    torchao.quantize_(small, getattr(torchao, config)())
    plain, merged = tomepass.apply(model, METHOD), tomepass.apply(small, METHOD)
    asked = torch.tensor([[8], [6]]).expand(-1, len(images))  # of every image
    assert torch.equal(merged_tokens(plain, images), asked)
    assert torch.equal(merged_tokens(merged, images), asked)
    with torch.no_grad():
        unmerged_error = _error(small(images).logits, model(images).logits)
        merged_error = _error(merged(images).logits, plain(images).logits)
        assert 0 < merged_error < MARGIN * unmerged_error
        if config == "Int8WeightOnlyConfig":
            program = tomepass.export(small, METHOD).module()
            given = program(pixel_values=images)["logits"]
            torch.testing.assert_close(given, merged(images).logits, rtol=1e-4, atol=1e-4)
        else:
            with pytest.raises(TomeError, match="torchao"):
                tomepass.export(small, METHOD)


@pytest.mark.doors
def test_a_scale_that_tokens_share_is_not_taken_for_their_own() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    from tracing import capture

    def quantised(groups: list[int]) -> Any:
        def function(x: Tensor) -> Tensor:
            scale, zero = torch.ops.torchao.choose_qparams_affine(
                x, "SYMMETRIC", groups, torch.int8, -128, 127, 1e-7, torch.float32, torch.int8
            )
            return torch.ops.torchao.quantize_affine(x, groups, scale, zero, torch.int8, -128, 127)

        graph = capture(function, torch.randn(2, 5, 8)).graph
        (node,) = [n for n in graph.nodes if "choose_qparams" in str(n.target)]
        return move(node, node.args[0], Axis(1), 5)

    assert torchao is not None
    assert quantised([1, 1, 8]) == Axis(1)
    assert "one scale for several tokens" in str(quantised([1, 5, 8]))


@pytest.mark.doors
def test_nncf_quantises_what_openvino_read(model: Any, images: Tensor) -> None:
    nncf = pytest.importorskip("nncf")
    openvino = pytest.importorskip("openvino")
    from tomepass.formats.openvino_ir import convert, token_products

    def errors(program: Any) -> tuple[float, Any]:
        converted = convert(program)
        hints = {"INFERENCE_PRECISION_HINT": "f32"}
        core = openvino.Core()
        before = core.compile_model(converted, "CPU", hints)([images.numpy()])[0].copy()
        dataset = nncf.Dataset([images.numpy()])
        small = nncf.quantize(
            converted,
            dataset,
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=token_products(converted)),
        )
        after = core.compile_model(small, "CPU", hints)([images.numpy()])[0]
        return _error(torch.tensor(after), torch.tensor(before)), small

    unmerged_error, _ = errors(export_unmerged(model))
    merged_error, small = errors(tomepass.export(model, METHOD))
    assert [node.get_type_name() for node in small.get_ops()].count("FakeQuantize") > 10
    asked = torch.tensor([[8], [6]]).expand(-1, len(images))
    assert torch.equal(merged_by_openvino(small, images), asked)
    assert 0 < merged_error < MARGIN * unmerged_error


@pytest.mark.doors
def test_decisions_can_be_taken_elsewhere(model: Any, images: Tensor) -> None:
    merged, x = tomepass.apply(model, METHOD), images[:2]
    given = decisions(merged, x)
    logits = merged(x).logits
    torch.testing.assert_close(with_decisions(merged, x, given), logits)
    swapped = [assign.flip(0) for assign in given]
    assert (with_decisions(merged, x, swapped) - logits).abs().max() > 1e-3


def test_what_is_not_installed_names_the_extra() -> None:
    with pytest.raises(TomeError, match=r"needs no_such_module.*\n.*tomepass\[quantization\]"):
        needed("no_such_module")
