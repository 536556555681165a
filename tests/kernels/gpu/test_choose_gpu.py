"""Which operators of a graph become Triton kernels: run in Triton's interpreter."""

from __future__ import annotations

import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx
from encoders import make, pixels
from lossless import calls
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from zoo import make_inputs, make_model

import tomepass
from tomepass import ToMe, TomeBackend
from tomepass.capture.captured import read_state
from tomepass.graphs.origin import value_of
from tomepass.graphs.surgery import copied
from tomepass.handover import applied as handed
from tomepass.handover.compiling import inner
from tomepass.kernels import attention_gpu, choose
from tomepass.kernels.gpu import choose as choose_gpu
from tomepass.kernels.gpu import device as gpu
from tomepass.kernels.gpu import match as gpu_match
from tomepass.kernels.gpu import merge as gpu_merge
from tomepass.kernels.gpu.choose import Lines, take_gpu_kernels
from tomepass.ops.attending import attend
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge, merge_size
from tomepass.ops.merging.unmerge import unmerge
from tomepass.proof import check as equivalence

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="not interpreted")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs count as CUDA's wherever they are."""
    monkeypatch.setattr(choose, "on_cuda", lambda graph: True)
    monkeypatch.setattr(handed, "on_cuda", lambda graph: True)


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
        exported = torch.export.export(merged, (x,))
    assert "triton" not in str(exported.graph)
    assert "tome.match" in str(exported.graph)
    (graph,) = graphs
    assert count(graph, torch.ops.tome.match_triton.default) == merges
    assert not count(graph, torch.ops.tome.match.default)


@pytest.mark.doors
@pytest.mark.usefixtures("everywhere")
def test_a_strict_export_has_no_kernels() -> None:
    x = pixels()
    merged = tomepass.apply(make(), r=3, example_inputs=x)
    exported = torch.export.export(merged, (x,), strict=True)
    assert "triton" not in str(exported.graph)
    assert "tome.match" in str(exported.graph)


MATCHES, REST = (f"kernels: {what} against the reference" for what in ("matches", "the rest"))


def permuted(match_image: Any, keys: Tensor, size: Any, assign: Tensor, *rest: Any) -> None:
    match_image(keys, size, assign, *rest)
    assign.copy_(assign.flip(0))  # the maps of other images


def scaled(sum_up: Any, place: int, *args: Any) -> None:
    sum_up(*args)
    (args[place] if place < 7 else args[7][3]).mul_(1.01)


WRONG = {
    "maps": (gpu_match, "_match_image", partial(permuted, gpu_match._match_image), MATCHES),
    "merged": (gpu_merge, "_sum_up", partial(scaled, gpu_merge._sum_up, 5), REST),
    "sizes": (gpu_merge, "_sum_up", partial(scaled, gpu_merge._sum_up, 6), REST),
    "normed": (gpu_merge, "_sum_up", partial(scaled, gpu_merge._sum_up, 7), REST),
    "attention": (attend, "_LEAST", 1.5, REST),
}


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    "names", [["maps"], pytest.param([*WRONG][1:], marks=pytest.mark.doors)], ids=str
)
@torch.no_grad()
def test_the_harness_holds_kernels_against_the_reference(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that is wrong every time in the same way fails it."""
    subjects: list[Any] = []

    def line(subject: Any, name: str) -> Any:
        subjects.append(subject)
        return equivalence._reference_line(subject, name)

    monkeypatch.setattr(attention_gpu, "path_for", lambda *given: ("channel", ""))
    monkeypatch.setattr(equivalence, "_LINES", {"2.": line})
    report = tomepass.check(make(), pixels(), r=3, inner="eager")
    assert report.ok, str(report)
    assert {MATCHES, REST} <= {line.name.strip() for line in report.lines}
    for where, name, wrong, failing in map(WRONG.__getitem__, names):
        with monkeypatch.context() as patched:
            patched.setattr(where, name, wrong)
            lines = list(equivalence.kernel_lines(subjects[0].applied, subjects[0].values))
        assert [line.name.strip() for line in lines if not line.passed] == [failing]


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
    values = [*read_state(model, applied.capture), *leaves(inputs)]
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
    assert inner._trains([next(model.parameters())])


def graph_of(work: Any, *inputs: Tensor) -> fx.GraphModule:
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
    other = "1 unmerge of other than rows: composite operators, there is no Triton kernel"
    assert lines == Lines(("2 merge: a Triton kernel", "1 unmerge: a Triton kernel", other))
    assert count(graph, gpu_merge.sources_triton) == 1  # of one map, made once
    assert count(graph, merge_size) == count(graph, unmerge) == 1
    for got, wanted in zip(graph(*inputs, assign), expected, strict=True):
        torch.testing.assert_close(got, wanted)


ADD = torch.ops.aten.add.Tensor
NORM = torch.ops.aten.layer_norm.default


def sum_of_rows(x: Tensor, row: Tensor, size: Tensor, assign: Tensor) -> Any:
    return merge(ADD(x, row), size, assign, 5)


def sum_with_alpha(x: Tensor, row: Tensor, size: Tensor, assign: Tensor) -> Any:
    return merge(ADD(x, x, alpha=2), size, assign, 5)


def sum_that_is_read(x: Tensor, row: Tensor, size: Tensor, assign: Tensor) -> Any:
    total = ADD(x, x)
    return merge(total, size, assign, 5), total * 2


def norm_by_later_weights(x: Tensor, row: Tensor, size: Tensor, assign: Tensor) -> Any:
    merged = merge(x, size, assign, 5)
    return NORM(merged, [4], row * 2, row * 3)


def norm_without_weights(x: Tensor, row: Tensor, size: Tensor, assign: Tensor) -> Any:
    return NORM(merge(x, size, assign, 5), [4])


def norm_of_more(x: Tensor, row: Tensor, size: Tensor, assign: Tensor) -> Any:
    plane = row.expand(5, 4)
    return NORM(merge(x, size, assign, 5), [5, 4], plane, plane)


def norm_of_another(x: Tensor, row: Tensor, size: Tensor, assign: Tensor) -> Any:
    return NORM(merge(x, size, assign, 5) * 2, [4], row, row)


@pytest.mark.parametrize(
    "work",
    [
        *(sum_of_rows, sum_with_alpha, sum_that_is_read),
        *(norm_by_later_weights, norm_without_weights, norm_of_more, norm_of_another),
    ],
)
def test_sums_and_norms_that_only_look_right_stay(work: Any) -> None:
    torch.manual_seed(0)
    assign = torch.tensor([[0, 1, 2, 3, 4, 4, 1]]).expand(2, -1)
    inputs = (torch.randn(2, 7, 4), torch.randn(4), torch.rand(2, 7) + 1, assign)
    graph = graph_of(work, *inputs)
    expected = graph(*inputs)
    lines = take_gpu_kernels(graph, CPU)
    graph.graph.lint()
    assert lines == Lines(("1 merge: a Triton kernel",))
    torch.testing.assert_close(graph(*inputs), expected)


@pytest.mark.parametrize("answers", [torch.bfloat16, torch.float32])
def test_a_norm_that_autocast_has_answer_in_float32_stays(answers: torch.dtype) -> None:
    def work(x: Tensor, row: Tensor, size: Tensor, assign: Tensor) -> Any:
        return NORM(merge(x, size, assign, 5), [4], row, row)

    x, row = torch.randn(2, 7, 4).bfloat16(), torch.randn(4).bfloat16()
    graph = graph_of(work, x, row, torch.rand(2, 7) + 1, torch.zeros(2, 7, dtype=torch.int64))
    (norm,) = graph.graph.find_nodes(op="call_function", target=NORM)
    norm.meta["val"] = value_of(norm).to(answers)
    (line,) = take_gpu_kernels(graph, CPU).chosen
    assert ("LayerNorm" in line) == (answers is torch.bfloat16)


def test_what_is_too_wide_or_too_long_stays_and_is_named() -> None:
    def work(x: Tensor, keys: Tensor, size: Tensor) -> Any:
        assign = match(keys, 2, [0])
        return unmerge(merge(x, size, assign, 5), assign, 1)

    with FakeTensorMode():
        inputs = (torch.randn(2, 7, 8193), torch.randn(2, 65, 7, 16), torch.rand(2, 7))
        graph = graph_of(work, *inputs)
    lines = take_gpu_kernels(graph, CPU)
    assert not lines.chosen
    assert lines.fallen == (
        "1 match: composite operators, for 65 heads, a kernel takes 64",
        "1 merge: composite operators, for 8193 channels, a kernel takes 8192",
        "1 unmerge: composite operators, for 8193 channels, a kernel takes 8192",
    )
    assert count(graph, match) == count(graph, merge) == count(graph, unmerge) == 1


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
        ((1, 12, 32, 256), torch.float16, [], 99 * 1024, ""),  # in one program
        ((1, 12, 64, 256), torch.float16, [], 99 * 1024, "256 channels a head need"),
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


@pytest.mark.parametrize(
    ("tokens", "width", "memory", "one"),
    [
        *((256, 64, 99, True), (257, 64, 227, False), (64, 128, 99, True)),
        *((128, 128, 96, True), (128, 128, 95, False), (129, 128, 227, False)),
        *((64, 256, 227, True), (64, 256, 99, False), (32, 256, 99, True)),
    ],
)
def test_one_program_shares_no_more_than_there_is(
    tokens: int, width: int, memory: int, one: bool
) -> None:
    assert gpu_match.in_one_program(tokens, width, memory * 1024) == one


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
            inner.resolve_inner("inductor", {})(graph, [])
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
    assert gpu.shared_memory(device) == 99 * 1024
    known = SimpleNamespace(shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
    assert gpu.shared_memory(device) == 232448
