"""Which operators of a graph become Triton kernels: run in Triton's interpreter."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx
from encoders import make, pixels
from lossless import calls
from torch import Tensor, fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from zoo import make_inputs, make_model

import tomepass
from tomepass import ToMe, TomeBackend, backend, module
from tomepass.graphs import copied
from tomepass.kernels import choose, choose_gpu, gpu_match, gpu_merge
from tomepass.kernels.choose_gpu import Lines, take_gpu_kernels
from tomepass.ops.match import match
from tomepass.ops.merge import merge, merge_size
from tomepass.ops.unmerge import unmerge

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="not interpreted")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs count as CUDA's wherever they are."""
    monkeypatch.setattr(choose, "on_cuda", lambda graph: True)
    monkeypatch.setattr(module, "on_cuda", lambda graph: True)


CPU = torch.device("cpu")


def count(graph: fx.GraphModule, target: Any) -> int:
    return len(calls(graph, target))


@pytest.mark.usefixtures("everywhere")
def test_a_merged_model_runs_on_kernels_and_exports_without() -> None:
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    model, x = make(), pixels()
    merged = tomepass.apply(model, r=3, example_inputs=x)
    applied = merged.captured(x)
    merges = sum(bool(block.r) for block in applied.report.blocks)
    assert count(applied.on_device, gpu_match.match_triton) == merges > 1
    assert count(applied.on_device, gpu_merge.merge_norm_triton) == merges
    assert not any(count(applied.on_device, c) for c in (match, merge, merge_size))
    assert count(applied.graph, match) == merges
    assert applied.report.kernels == (
        f"{merges} match: a Triton kernel",
        f"{merges} merge with sum before it with LayerNorm after it: a Triton kernel",
    )
    assert "kernels" in str(applied.report)
    with torch.no_grad():
        torch.testing.assert_close(merged(x), applied.run(model, [x], applied.graph)[0])
        compiled = torch.compile(merged, backend=keep, fullgraph=True)
        torch.testing.assert_close(compiled(x), merged(x))
        for strict in (False, True):
            exported = torch.export.export(merged, (x,), strict=strict)
            assert "triton" not in str(exported.graph)
            assert "tome.match" in str(exported.graph)
    (graph,) = graphs
    assert count(graph, torch.ops.tome.match_triton.default) == merges
    assert not count(graph, torch.ops.tome.match.default)


@pytest.mark.usefixtures("everywhere")
def test_gradients_are_the_composite_s() -> None:
    model, x = make().requires_grad_(True), pixels()
    applied = tomepass.apply(model, r=3, example_inputs=x).captured(x)

    def gradients(graph: fx.GraphModule) -> list[Tensor]:
        model.zero_grad()
        applied.run(model, [x], graph)[0].square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    ours, theirs = gradients(applied.on_device), gradients(applied.graph)
    assert len(ours) > 10
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["beit", "bert_padded"])
@torch.no_grad()
def test_layer_scales_biases_and_padding(name: str) -> None:
    model, inputs = make_model(name), make_inputs(name)
    applied = tomepass.apply(model, r=4, example_inputs=inputs).captured(inputs)
    graph = copied(applied.graph)
    lines = take_gpu_kernels(graph, CPU)
    taken = " ".join(lines.chosen)
    assert "match: a Triton kernel" in taken
    assert "merge" in taken
    assert ("merge_bias: composite operators, there is no" in taken) == (name == "beit")
    assert not lines.fallen
    values = [*module.read_state(model, applied.capture), *leaves(inputs)]
    for got, expected in zip(graph(*values), applied.graph(*values), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def leaves(inputs: dict[str, Any]) -> list[Any]:
    return torch.utils._pytree.tree_leaves(inputs)


@pytest.mark.usefixtures("everywhere")
def test_a_graph_in_training_takes_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[fx.GraphModule] = []

    def compile_fx(gm: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        graphs.append(gm)
        return gm

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    model = make().requires_grad_(True)
    torch.compile(model, backend=TomeBackend(ToMe(3)))(pixels()).sum().backward()
    assert count(graphs[0], gpu_match.match_triton) > 1
    assert next(model.parameters()).grad is not None
    assert backend._trains([next(model.parameters())])


def graph_of(work: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    graph = fx.symbolic_trace(work)
    FakeTensorProp(graph).propagate(*inputs)
    return graph


class Merging(nn.Module):
    """A merge whose sum, sizes and result others read too."""

    def forward(self, x: Tensor, y: Tensor, size: Tensor, assign: Tensor) -> tuple[Tensor, ...]:
        before = merge_size(size, assign, 5)
        total = torch.ops.aten.add.Tensor(x, y)
        merged = merge(total, size, assign, 5)
        again = merge(y, size, assign, 5)
        back = unmerge(merged, assign, 1)
        return before, total, merged, again, back, unmerge(size, assign, 1)


def test_what_others_read_stays() -> None:
    inputs = (torch.randn(2, 7, 4), torch.randn(2, 7, 4), torch.rand(2, 7) + 1)
    assign = torch.tensor([[0, 1, 2, 3, 4, 4, 1]]).expand(2, -1)
    graph = graph_of(Merging(), *inputs, assign)
    expected = graph(*inputs, assign)
    lines = take_gpu_kernels(graph, CPU)
    graph.graph.lint()
    assert lines == Lines(("2 merge: a Triton kernel", "1 unmerge: a Triton kernel"))
    assert count(graph, gpu_merge.sources_triton) == 1  # of one map, made once
    assert count(graph, merge_size) == count(graph, unmerge) == 1
    for got, wanted in zip(graph(*inputs, assign), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_dtype_without_kernels_stays_and_is_named() -> None:
    inputs = [torch.randn(2, 7, 4).double(), torch.randn(2, 7, 4).double(), torch.rand(2, 7)]
    assign = torch.tensor([[0, 1, 2, 3, 4, 4, 1]]).expand(2, -1)
    lines = take_gpu_kernels(graph_of(Merging(), *inputs, assign), CPU)
    assert lines.fallen == (
        "2 merge: composite operators, for torch.float64",
        "1 unmerge: composite operators, for torch.float64",
    )


@pytest.mark.parametrize(
    ("shape", "dtype", "protected", "memory", "reason"),
    [
        ((1, 12, 4097, 64), torch.bfloat16, [0], 99 * 1024, ""),
        ((1, 12, 197, 256), torch.float16, [], 227 * 1024, ""),
        ((1, 12, 197, 256), torch.float16, [], 99 * 1024, "256 channels a head need"),
        ((1, 12, 197, 320), torch.float32, [], 227 * 1024, "320 channels a head, a kernel takes"),
        ((1, 12, 9000, 64), torch.float32, [], 227 * 1024, "9000 tokens, a kernel takes 8192"),
        ((1, 65, 197, 64), torch.float32, [], 227 * 1024, "65 heads"),
        ((1, 12, 197, 64), torch.float64, [], 227 * 1024, "torch.float64 keys"),
        ((1, 12, 197, 64), torch.float32, range(0, 40, 2), 1 << 18, "20 stretches of protected"),
        ((1, 12, 197, 64), torch.float32, range(97, 197), 1 << 18, ""),
    ],
)
def test_what_fits_no_kernel(
    shape: Any, dtype: Any, protected: Any, memory: int, reason: str
) -> None:
    found = gpu_match.unfit(shape, dtype, list(protected), memory)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_without_triton_the_report_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fx.GraphModule(nn.Module(), fx.Graph())
    monkeypatch.setattr(choose_gpu, "find_spec", lambda name: None)
    reason = "composite operators: triton is not installed (pip install 'tomepass[gpu]')"
    assert take_gpu_kernels(graph, CPU) == Lines(fallen=(reason,))
    monkeypatch.setenv("TOMEPASS_TRITON", "0")
    assert take_gpu_kernels(graph, CPU) == Lines(("composite operators: TOMEPASS_TRITON=0",))


def test_a_device_too_old_for_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, named in (((7, 5), "the device has 7.5"), ((8, 0), ""), ((9, 0), "")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=found: c)
        assert choose_gpu.missing(torch.device("cuda")).endswith(named)
        assert bool(choose_gpu.missing(torch.device("cuda"))) == bool(named)


@pytest.mark.usefixtures("everywhere")
def test_the_backend_warns_of_what_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no report."""
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", lambda gm, *a, **k: gm)
    inputs = [torch.randn(2, 7, 4).double(), torch.randn(2, 7, 4).double(), torch.rand(2, 7)]
    assign = torch.tensor([[0, 1, 2, 3, 4, 4, 1]]).expand(2, -1)

    def warned() -> list[str]:
        graph = graph_of(Merging(), *inputs, assign)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            backend.resolve_inner("inductor", {})(graph, [])
        return [str(w.message) for w in caught]

    (line,) = warned()
    assert line == (
        "not on Triton kernels: 2 merge: composite operators, for torch.float64; "
        "1 unmerge: composite operators, for torch.float64"
    )
    monkeypatch.setattr(choose_gpu, "find_spec", lambda name: None)
    (line,) = warned()
    assert "pip install 'tomepass[gpu]'" in line
    monkeypatch.setenv("TOMEPASS_TRITON", "0")
    assert not warned()


def test_the_shared_memory_of_a_device_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    assert choose_gpu.shared_memory(device) == 99 * 1024
    known = SimpleNamespace(shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
    assert choose_gpu.shared_memory(device) == 232448
