"""Both captures: one dialect, the inputs told from the state, and failures that say why."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from zoo import make_inputs, make_model

import tomepass
from tomepass import TomeError
from tomepass.capture.captured import read_state
from tomepass.capture.dynamo import capture_dynamo, fix_sizes
from tomepass.capture.exported import capture_module
from tomepass.graphs.canonical import CanonicalGraph
from tomepass.graphs.constants import constant_value
from tomepass.graphs.origin import source_line
from tomepass.model.calls import describe_inputs

aten = torch.ops.aten


class Mixed(nn.Module):
    """Every kind of tensor a forward can read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.tied = self.linear.weight
        self.register_buffer("shift", torch.ones(3), persistent=False)
        self.plain = torch.full((3,), 2.0)

    def forward(self, x: Tensor, labels: Tensor | None = None, double: bool = False) -> Any:
        y = (self.linear(x) + self.shift) * self.plain + torch.tensor([1.0, 2.0, 3.0])
        y = y @ self.tied
        return {"y": y * 2 if double else y, "labels": labels}


def dynamo_graphs(
    model: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any
) -> list[tuple[CanonicalGraph, fx.GraphModule, list[Any]]]:
    """What the backend captures of every graph that Dynamo hands over."""
    graphs = []

    def keep(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        captured = capture_dynamo(graph, inputs)
        graphs.append((fix_sizes(captured, graph, inputs), graph, inputs))
        return graph

    torch.compile(model, backend=keep, dynamic=dynamic)(*args, **kwargs)
    return graphs


def data_shapes(captured: CanonicalGraph) -> list[Any]:
    nodes = [n for n in captured.graph.nodes if n.name in captured.data]
    return [n.meta["val"].shape for n in nodes]


# The exported graph


def test_state_and_data_are_told_apart() -> None:
    model = Mixed()
    capture = capture_module(model, {"x": torch.randn(4, 3), "labels": torch.arange(4)})
    names = [s for s in capture.state if isinstance(s, str)]
    assert sorted(names) == ["linear.bias", "linear.weight", "plain", "shift", "tied"]
    (constant,) = [s for s in capture.state if isinstance(s, Tensor)]
    assert constant.tolist() == [1.0, 2.0, 3.0]
    placeholders = capture.graph.graph.find_nodes(op="placeholder")
    assert [n.name in capture.graph.data for n in placeholders] == [False] * 6 + [True] * 2
    assert not capture.graph.fragment


def test_every_node_carries_a_fake_value_and_the_dialect_is_aten() -> None:
    capture = capture_module(make_model("vit"), make_inputs("vit"))
    graph = capture.graph.graph
    for node in graph.nodes:
        if node.op == "call_function":
            assert isinstance(node.target, torch._ops.OpOverload), node.target
            assert isinstance(node.meta["val"], FakeTensor | torch.SymInt), node
    assert len(graph.find_nodes(op="call_function", target=aten.linear.default)) == 3 * 6 + 1
    attention = aten.scaled_dot_product_attention.default
    assert len(graph.find_nodes(op="call_function", target=attention)) == 3
    assert capture.graph.fake_mode is graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_batch_is_symbolic_and_nothing_else_is(batch: int) -> None:
    capture = capture_module(Mixed(), {"x": torch.randn(batch, 3), "labels": torch.ones(batch)})
    x, labels = data_shapes(capture.graph)
    assert isinstance(x[0], torch.SymInt)
    assert str(labels[0]) == str(x[0])
    assert x[1:] == (3,)
    for size in (1, 3, 8):
        state = read_state(Mixed(), capture)
        y, _ = capture.graph.module(*state, torch.ones(size, 3), torch.ones(size))
        assert y.shape == (size, 3)


def test_other_inputs_are_held_as_they_were() -> None:
    model, x = Mixed(), torch.randn(2, 3)
    for double in (False, True):
        capture = capture_module(model, {"x": x, "double": double})
        y, _ = capture.graph.module(*read_state(model, capture), x, double)
        torch.testing.assert_close(y, model(x, double=double)["y"])


def test_what_falls_into_kwargs_is_captured() -> None:
    class Loose(nn.Module):
        def forward(self, x: Tensor, **options: Any) -> Tensor:
            return x * options["scale"] + options["offset"]

    x, offset = torch.randn(2, 3), torch.randn(2, 3)
    capture = capture_module(Loose(), {"x": x, "offset": offset, "scale": 3})
    (y,) = capture.graph.module(x, offset, 3)
    torch.testing.assert_close(y, 3 * x + offset)
    assert len(capture.graph.data) == 2


def test_constants_made_in_inference_mode_can_be_trained_with() -> None:
    model = Mixed()
    with torch.inference_mode():
        capture = capture_module(model, {"x": torch.randn(2, 3)})
    assert not any(s.is_inference() for s in capture.state if isinstance(s, Tensor))


# What no graph can hold


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.mul_(0.5)
        return x * self.scale


class WritesItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 0].mul_(2)
        return x + 1


class WritesItsOwn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        return y.add_(1).mul_(torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("make", [Counts, Halves, WritesItsInput])
def test_a_model_that_writes_to_its_state_or_inputs_is_refused(make: Any) -> None:
    with pytest.raises(TomeError, match="writes to its inputs or its own state") as refused:
        capture_module(make(), {"x": torch.ones(2, 3)})
    assert "test_exported.py" in str(refused.value)


def test_batch_norm_is_refused_in_training_and_taken_in_eval() -> None:
    model = nn.BatchNorm1d(3)
    with pytest.raises(TomeError, match="eval mode"):
        capture_module(model, {"input": torch.randn(4, 3)})
    capture_module(model.eval(), {"input": torch.randn(4, 3)})


def test_a_model_may_write_to_what_it_made() -> None:
    capture = capture_module(WritesItsOwn(), {"x": torch.ones(2, 3)})
    (y,) = capture.graph.module(*capture.state, torch.ones(2, 3))
    assert y.tolist() == [[3.0, 6.0, 9.0]] * 2


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class NeedsTwoByTwo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 2:
            raise ValueError("only pairs here")
        return x


@pytest.mark.parametrize(
    ("model", "call", "complaint"),
    [
        (Branches(), {"x": torch.ones(2, 3)}, r"x float32\[2, 3\].*GuardOnDataDependent"),
        (NeedsTwoByTwo(), {"x": torch.ones(2, 3)}, "ValueError: only pairs here"),
        (Mixed(), {"x": torch.ones(2, 3), "unknown": 1}, "unexpected keyword argument 'unknown'"),
        (Mixed(), {"labels": torch.ones(2)}, "missing 1 required positional argument: 'x'"),
        (Mixed(), {"x": torch.ones(2, 4)}, "same reduction dim"),
    ],
)
def test_an_export_failure_says_what_failed(
    model: nn.Module, call: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(TomeError) as failed:
        capture_module(model, call)
    assert re.search(complaint, str(failed.value), re.DOTALL)
    assert type(model).__name__ in str(failed.value)
    assert "What to do" in str(failed.value)
    assert failed.value.__cause__ is not None


def test_a_call_without_tensors_is_refused() -> None:
    with pytest.raises(TomeError, match="no tensor among the inputs"):
        capture_module(Mixed(), {"double": True})


# The Dynamo graph


def test_dynamo_graphs_come_out_in_the_same_dialect() -> None:
    model, inputs = make_model("vit"), make_inputs("vit")
    ((captured, gm, values),) = dynamo_graphs(model, **inputs)
    assert captured.fragment
    exported = capture_module(model, inputs).graph

    for operator in (aten.linear, aten.layer_norm, aten.scaled_dot_product_attention):
        ours, theirs = (
            len(g.graph.find_nodes(op="call_function", target=operator.default))
            for g in (captured, exported)
        )
        assert ours == theirs > 0
    assert data_shapes(captured) == [(2, 3, 32, 32)]
    names = [n.name for n in captured.graph.find_nodes(op="placeholder")]
    assert len(names) == len(gm.graph.find_nodes(op="placeholder")) == len(values)
    with torch.no_grad():
        (logits,) = captured.module(*values)
        assert torch.equal(logits, model(**inputs).logits)


def test_plain_tensors_of_a_module_are_its_state_under_dynamo_too() -> None:
    ((captured, _, _),) = dynamo_graphs(Mixed(), torch.randn(2, 3), torch.arange(2))
    assert sorted(map(list, data_shapes(captured))) == [[2, 3]]


def test_under_dynamic_shapes_the_batch_alone_stays_symbolic() -> None:
    model, pixels = make_model("vit"), torch.randn(2, 3, 40, 40)
    ((captured, _, _),) = dynamo_graphs(model, pixels, interpolate_pos_encoding=True, dynamic=True)
    (shape,) = data_shapes(captured)
    assert isinstance(shape[0], torch.SymInt)
    assert shape[1:] == (3, 40, 40)
    attention = captured.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    assert {tuple(map(str, n.meta["val"].shape[1:])) for n in attention} == {("4", "101", "8")}


def test_capturing_leaves_the_fake_mode_as_it_was() -> None:
    modes = []

    def look(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        mode = capture_dynamo(graph, inputs).fake_mode
        modes.append(mode.allow_non_fake_inputs)
        return graph

    torch.compile(nn.Linear(3, 3), backend=look)(torch.ones(2, 3))
    assert modes == [False]


# Words


def test_inputs_are_described_by_type_and_shape() -> None:
    call = {
        "pixel_values": torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16),
        "labels": None,
        "flag": True,
        "pair": (torch.zeros(2), {"a": torch.zeros(1, dtype=torch.int64)}),
    }
    expected = "pixel_values bfloat16[2, 3, 8, 8], flag=True, pair=(float32[2], {a int64[1]})"
    assert describe_inputs(call) == expected


@pytest.mark.parametrize("door", ["export", "dynamo"])
def test_source_lines_are_the_models(door: str) -> None:
    model, inputs = make_model("vit"), make_inputs("vit")
    if door == "export":
        graph = capture_module(model, inputs).graph.graph
    else:
        graph = dynamo_graphs(model, **inputs)[0][0].graph
    attention = aten.scaled_dot_product_attention.default
    for node in graph.find_nodes(op="call_function", target=attention):
        line = source_line(node)
        assert line is not None
        assert re.match(r"(vit/modeling_vit|integrations/sdpa_attention)\.py:\d+: .*att", line), (
            line
        )
    norm, *_ = graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    assert "modeling_vit.py" in str(source_line(norm))


def test_a_node_without_a_trace_has_no_source_line() -> None:
    graph = fx.Graph()
    assert source_line(graph.placeholder("x")) is None


def test_the_source_line_of_a_module_of_torchs_own_is_not_ours() -> None:
    capture = capture_module(nn.Sequential(nn.Linear(3, 3)), {"input": torch.ones(2, 3)})
    (linear,) = capture.graph.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert "tomepass" not in str(source_line(linear))


@pytest.mark.deep
def test_the_dump_folder_gets_both_graphs(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("TOMEPASS_DUMP", str(tmp_path))
    tomepass.apply(make_model("vit"), r=8)
    before, after = sorted(path.read_text() for path in tmp_path.iterdir())
    assert ("tome.match" in before) != ("tome.match" in after)


class WithNumber(nn.Module):
    """Adds a number that is written as a tensor, where a mask is true: everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        mask = (torch.arange(3) >= 0)[None].expand(x.shape[0], 3)
        return x + torch.where(mask, torch.tensor(0.5), -torch.inf)


def test_a_number_written_as_a_tensor_is_a_number_in_the_graph() -> None:
    model, x = WithNumber(), torch.randn(4, 3)
    captured = capture_module(model, {"x": x})
    graph = captured.graph.graph
    assert not graph.find_nodes(op="call_function", target=aten.lift_fresh_copy.default)
    (mask,) = graph.find_nodes(op="call_function", target=aten.where.ScalarOther)
    value = constant_value(mask, up_to_broadcast=True)
    assert value is not None
    assert value.tolist() == [[0.5] * 3]
    outputs = captured.graph.module(*read_state(model, captured), x)
    assert torch.equal(pytree.tree_leaves(outputs)[0], model(x))
