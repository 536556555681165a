"""Paths of proportional attention for CUDA: exact against float64, and chosen by a table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import make, pixels
from lossless import calls
from torch import Tensor, fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.attention import SDPBackend, sdpa_kernel

import tomepass
from benchmarks.gpu.kernels import flex
from tomepass.graphs.nodes import FUSED
from tomepass.graphs.surgery import copied
from tomepass.kernels import attention_gpu
from tomepass.kernels.attention_gpu import Rule, path_for, take_gpu_attention
from tomepass.ops.attending.attend import attend_channel, attend_cudnn, attend_scaled
from tomepass.ops.attending.log_size import log_size
from tomepass.ops.padding import PADDED

HOPPER = (9, 0)
PORTABLE = [attend_channel, attend_scaled]


def operands(dtype: torch.dtype, width: int = 24) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 17, 3, width).to(dtype).transpose(1, 2) for _ in range(3))
    size = torch.randint(1, 40, (2, 17)).float()
    size[0, 3] = PADDED * 1e-24
    size[1, 5] = 0.0
    return q, k, v, size


def written_out(q: Tensor, k: Tensor, v: Tensor, size: Tensor, scale: float) -> Tensor:
    """Sizes multiply the exponentials: no logarithm, in float64."""
    weights = (q.double() @ k.double().transpose(-1, -2) * scale).exp()
    weights = weights * size.double()[:, None, None, :]
    result: Tensor = (weights / weights.sum(-1, keepdim=True)) @ v.double()
    return result


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("width", [24, 30])
@pytest.mark.parametrize("operator", PORTABLE)
def test_paths_are_exact_in_float64(operator: Any, width: int, scale: float | None) -> None:
    q, k, v, size = operands(torch.float64, width)
    expected = written_out(q, k, v, size, scale or width**-0.5)
    torch.testing.assert_close(operator(q, k, v, size, scale), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_exact_in_float64() -> None:
    """Of the benchmark: no graph holds it."""
    q, k, v, size = operands(torch.float64)
    expected = written_out(q, k, v, size, 24**-0.5)
    torch.testing.assert_close(flex(q, k, v, size.double()), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", PORTABLE)
def test_paths_are_no_further_from_float64_than_the_bias(operator: Any, dtype: torch.dtype) -> None:
    q, k, v, size = operands(dtype)
    size = size.clamp(min=1.0)
    expected = written_out(q, k, v, size, q.shape[-1] ** -0.5)
    bias = torch.ops.tome.log_size(size, q)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    got = operator(q, k, v, size)
    assert got.dtype == dtype
    assert (got - expected).abs().max() <= 3 * (plain - expected).abs().max() + 1e-6


@pytest.mark.parametrize("operator", PORTABLE)
def test_gradients_are_those_of_the_bias(operator: Any) -> None:
    q, k, v, size = operands(torch.float64)
    found = []
    for run in (operator, lambda *a: written_out(*a, scale=24**-0.5)):
        inputs = [x.detach().clone().requires_grad_(True) for x in (q, k, v)]
        found.append(torch.autograd.grad(run(*inputs, size).square().sum(), inputs))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_what_was_measured_is_taken_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = (
        Rule("cudnn", HOPPER, (torch.bfloat16, torch.float32), (64, 30), most=256),
        Rule("channel", HOPPER, (torch.bfloat16,), (64,), least=257),
    )
    unknown = ("bias", "the default: nothing measured for this device and shape")
    assert path_for(HOPPER, 197, torch.bfloat16, 64) == unknown
    monkeypatch.setattr(attention_gpu, "MEASURED", rules)
    assert path_for(HOPPER, 197, torch.bfloat16, 64) == ("cudnn", "")
    assert path_for(HOPPER, 577, torch.bfloat16, 64) == ("channel", "")
    assert path_for(HOPPER, 197, torch.bfloat16, 72) == unknown
    assert path_for((8, 0), 197, torch.bfloat16, 64) == unknown
    for dtype, width in ((torch.float32, 64), (torch.bfloat16, 30)):
        path, why = path_for(HOPPER, 197, dtype, width)
        assert path == "bias"
        assert why == f"the fastest, cuDNN's kernel, takes no {dtype} in heads of {width}"


def lines_of(attend: Any, rule: Rule | None, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """What the report says of a graph with one attention, ``rule`` having been measured."""
    graph = fx.symbolic_trace(attend)
    q, _, _, size = operands(torch.bfloat16)
    FakeTensorProp(graph).propagate(q, size, torch.zeros(1, 3, 17, 17).to(q))
    monkeypatch.setattr(attention_gpu, "MEASURED", (rule,) if rule else ())
    monkeypatch.setattr(attention_gpu, "_capability", lambda device: HOPPER)
    return take_gpu_attention(graph)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (None, "log(size) as a bias (the default: nothing measured for this device and shape)"),
        ("bias", "log(size) as a bias"),
        ("channel", "log(size) as two more key channels"),
    ],
)
def test_the_report_tells_measured_from_unknown(
    path: Any, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(q: Tensor, size: Tensor, table: Tensor) -> Any:
        return FUSED(q, q, q, log_size(size, q))

    rule = Rule(path, HOPPER, (torch.bfloat16,), (24,)) if path else None
    assert lines_of(plain, rule, monkeypatch) == (f"1 attention: {line}",)


def shared(q: Tensor, size: Tensor, table: Tensor) -> Any:
    return FUSED(q, q, q, log_size(size, q), enable_gqa=True)


def dropped(q: Tensor, size: Tensor, table: Tensor) -> Any:
    return FUSED(q, q, q, log_size(size, q), 0.1)


def positioned(q: Tensor, size: Tensor, table: Tensor) -> Any:
    return FUSED(q, q, q, torch.ops.aten.add.Tensor(table, log_size(size, q)))


def hiding(q: Tensor, size: Tensor, table: Tensor) -> Any:
    return FUSED(q, q, q, torch.ops.aten.clamp.default(log_size(size, q), None, 0.0))


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (shared, "heads share keys"),
        (dropped, "with dropout"),
        (positioned, "with another bias beside it"),
        (hiding, "sizes hide padding and do no more"),
    ],
)
def test_what_no_other_path_computes_is_named(
    attend: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = lines_of(attend, Rule("channel", HOPPER, (torch.bfloat16,), (24,)), monkeypatch)
    assert found == (f"1 attention: log(size) as a bias ({why})",)


def test_an_attention_without_sizes_is_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not lines_of(lambda q, size, table: FUSED(q, q, q, table), None, monkeypatch)


@pytest.mark.parametrize("path", ["bias", "channel", "scaled"])
@torch.no_grad()
def test_a_graph_on_another_path_computes_the_same(
    path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = make(), pixels()
    applied = tomepass.apply(model, r=3, example_inputs=x).captured(x)
    assert applied.graph is not None
    graph: fx.GraphModule = copied(applied.graph)
    monkeypatch.setattr(attention_gpu, "path_for", lambda *given: (path, ""))
    (line,) = take_gpu_attention(graph)
    graph.graph.lint()
    count = int(line.split()[0])
    assert count >= 1
    assert line.split(": ")[1] == attention_gpu._HOW[path]
    before, after = (len(calls(g, FUSED)) for g in (applied.graph, graph))
    assert before - after == (0 if path == "bias" else count)
    expected = applied.run(model, [x], applied.graph)[0]
    torch.testing.assert_close(applied.run(model, [x], graph)[0], expected, rtol=1e-5, atol=1e-5)


def with_bias(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=log_size(size, q))


PATHS = {
    "bias": with_bias,
    "channel": attend_channel,
    "scaled": attend_scaled,
    "cudnn": attend_cudnn,
}
FORWARD = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def check_path(
    path: str, kernel: SDPBackend, dtype: torch.dtype, device: str, tokens: int, width: int
) -> None:
    """A path and its gradients by one kernel and no other, against float64."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, tokens, 4, width).transpose(1, 2).to(device, dtype) for _ in range(3)]
    size = torch.randint(1, 40, (2, tokens)).float().to(device)
    grad = torch.randn(2, 4, tokens, width).to(device, dtype)
    leaves = [x.requires_grad_(True) for x in inputs]
    with sdpa_kernel([kernel]):  # any other raises
        got = PATHS[path](*leaves, size)
        gradients = torch.autograd.grad(got, leaves, grad)
    wide = [x.detach().double().requires_grad_(True) for x in inputs]
    expected = written_out(*wide, size, width**-0.5)  # type: ignore[call-arg, misc]
    exact = torch.autograd.grad(expected, wide, grad.double())
    assert (got - expected).abs().max() <= FORWARD[dtype] * expected.abs().max()
    for ours, theirs in zip(gradients, exact, strict=True):
        assert (ours - theirs).abs().max() <= 4 * FORWARD[dtype] * theirs.abs().max()


@pytest.mark.parametrize("path", ["bias", "channel", "scaled"])
def test_paths_and_gradients_by_one_kernel(path: str) -> None:
    check_path(path, SDPBackend.MATH, torch.float32, "cpu", 17, 24)


FLASH, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION


@pytest.mark.cuda
@pytest.mark.parametrize(("tokens", "width"), [(197, 64), (181, 64), (577, 64), (729, 72)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("path", PATHS)
def test_paths_on_the_device(path: str, dtype: torch.dtype, tokens: int, width: int) -> None:
    if path == "cudnn" and dtype is torch.float32:
        pytest.skip("cuDNN's kernel multiplies narrow dtypes only")
    # Flash has neither a bias nor float32; cuDNN's operator is called by its name.
    flash = path in ("channel", "scaled") and dtype is not torch.float32
    kernel = SDPBackend.CUDNN_ATTENTION if path == "cudnn" else FLASH if flash else EFFICIENT
    check_path(path, kernel, dtype, "cuda", tokens, width)
