"""Who gets kernels: Inductor on a CPU, in a dtype there are some for, where nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx
from encoders import make, pixels
from torch import Tensor, fx, nn
from zoo import make_inputs, make_model, output_of, relative_error

import tomepass
from tomepass import ToMe, TomeBackend
from tomepass.kernels.choose import take_kernels
from tomepass.kernels.cpu import match_cpu, merge_bias_cpu, merge_cpu, pad_keys_cpu
from tomepass.ops.attending.log_size import log_size
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge, merge_size
from tomepass.ops.merging.side import merge_bias


def count(graph: fx.GraphModule, target: Any) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=target))


def compiled(model: nn.Module, x: Tensor, backend: Any) -> Tensor:
    torch._dynamo.reset()
    result: Tensor = torch.compile(model, backend=backend)(x)
    return result


@pytest.mark.parametrize("door", ["backend", "applied"])
def test_inductor_gets_kernels_that_compute_the_same(
    door: str, handed: list[fx.GraphModule]
) -> None:
    model, x = make(), pixels()
    merged = tomepass.apply(model, r=3, example_inputs=x)
    with torch.no_grad():
        expected = merged(x)
        subject, method = (model, ToMe(3)) if door == "backend" else (merged, None)
        got = compiled(subject, x, TomeBackend(method))
    (graph,) = handed
    merging = [block for block in merged.report(x).streams[0].blocks if block.r]
    assert count(graph, match_cpu) == count(graph, merge_cpu) == len(merging) > 1
    assert not any(count(graph, composite) for composite in (match, merge, merge_size))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_keys_padded_for_matrix_units_take_one_pass(
    handed: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    model, x = make().bfloat16(), pixels().bfloat16()
    with torch.no_grad():
        expected = tomepass.apply(model, r=3, example_inputs=x)(x)
        got = compiled(model, x, TomeBackend(ToMe(3)))
    (graph,) = handed
    graph.graph.lint()
    assert count(graph, pad_keys_cpu) == 1
    assert not count(graph, torch.ops.aten.constant_pad_nd.default) + count(graph, log_size)
    torch.testing.assert_close(got, expected, rtol=0, atol=2**-6 * float(expected.abs().max()))


def test_position_biases_take_a_kernel(handed: list[fx.GraphModule]) -> None:
    model, inputs = make_model("beit"), make_inputs("beit")
    with torch.no_grad():
        expected = output_of("beit", tomepass.apply(model, r=4)(**inputs))
        torch._dynamo.reset()
        got = output_of("beit", torch.compile(model, backend=TomeBackend(ToMe(4)))(**inputs))
    (graph,) = handed
    assert count(graph, merge_bias_cpu) == count(graph, match_cpu) - 1
    assert not count(graph, merge_bias)
    assert relative_error(got, expected) < 1e-5


def test_what_is_trained_keeps_its_gradients(handed: list[fx.GraphModule]) -> None:
    compiled(make().requires_grad_(True), pixels(), TomeBackend(ToMe(3)))
    (graph,) = handed
    assert count(graph, match) == count(graph, merge) > 1
    assert not count(graph, match_cpu)


def test_a_dtype_without_kernels_keeps_the_composites(handed: list[fx.GraphModule]) -> None:
    with torch.no_grad():
        compiled(make().double(), pixels().double(), TomeBackend(ToMe(3)))
    (graph,) = handed
    assert count(graph, match) > 1
    assert not count(graph, match_cpu) + count(graph, merge_cpu)


def test_other_compilers_get_the_composites() -> None:
    graphs: list[fx.GraphModule] = []

    def inner(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm

    with torch.no_grad():
        compiled(make(), pixels(), TomeBackend(ToMe(3), inner=inner))
    assert count(graphs[0], match) > 1
    assert not count(graphs[0], match_cpu)


@pytest.mark.parametrize("size_first", [False, True])
def test_a_size_is_taken_with_its_tokens_where_it_stands_after_them(size_first: bool) -> None:
    class Merging(nn.Module):
        def forward(self, x: Tensor, size: Tensor, assign: Tensor) -> tuple[Tensor, Tensor]:
            if size_first:
                total = merge_size(size, assign, 5)
                return merge(x, size, assign, 5) * total.unsqueeze(-1), total
            return merge(x, size, assign, 5), merge_size(size, assign, 5)

    x, size = torch.randn(2, 7, 4), torch.rand(2, 7) + 1
    assign = torch.tensor([[0, 1, 2, 3, 4, 4, 1]]).expand(2, -1)
    graph = torch.fx.symbolic_trace(Merging())
    torch.fx.passes.fake_tensor_prop.FakeTensorProp(graph).propagate(x, size, assign)
    expected = graph(x, size, assign)
    take_kernels(graph)
    graph.graph.lint()
    assert count(graph, merge_cpu) == 1
    assert count(graph, merge_size) == int(size_first)
    for got, wanted in zip(graph(x, size, assign), expected, strict=True):
        torch.testing.assert_close(got, wanted)
