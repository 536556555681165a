"""What is told from two batches is what running on symbolic sizes says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from depth import at_hand
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from zoo import FAMILIES, make_inputs

import tomepass
from tomepass.ops.results import RESULTS
from tomepass.rewriting.any_batch import AnyBatch, NotTold

aten = torch.ops.aten


def batched(mode: FakeTensorMode, x: Tensor, dims: int = 1) -> Tensor:
    """A fake tensor of an open size on its first dimensions."""
    kinds = [DimDynamic.DYNAMIC] * dims + [DimDynamic.STATIC] * (x.ndim - dims)
    return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))


@pytest.fixture
def mode() -> FakeTensorMode:
    return FakeTensorMode(shape_env=ShapeEnv())


def alike(told: Any, run: Any) -> bool:
    if not isinstance(run, Tensor):
        return bool(told == run)
    same = (told.shape, told.dtype, told.device) == (run.shape, run.dtype, run.device)
    return same and told.stride() == run.stride()


def calls(graph: torch.fx.Graph) -> Iterator[tuple[torch.fx.Node, Any, Any]]:
    for node in graph.nodes:
        if node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            yield node, args, kwargs


@pytest.mark.parametrize("name", at_hand(FAMILIES, ["beit"]))
def test_every_operator_of_a_family(name: str, shared_models: Any) -> None:
    """Told without running it on symbolic sizes, and the same."""
    merged = tomepass.apply(shared_models[name], r=2, example_inputs=make_inputs(name))
    applied = merged.captured(make_inputs(name))
    told = 0
    for graph in (applied.capture.graph.graph, applied.graph.graph):
        values = [n.meta["val"] for n in graph.nodes if isinstance(n.meta.get("val"), Tensor)]
        any_batch = AnyBatch(values[0].fake_mode)
        for node, args, kwargs in calls(graph):
            with values[0].fake_mode:
                run = torch.utils._pytree.tree_leaves(node.target(*args, **kwargs))
            found = any_batch.returned(RESULTS.get(node.target, node.target), args, kwargs)
            assert all(map(alike, torch.utils._pytree.tree_leaves(found), run)), node.format_node()
            told += 1
    assert told > 50


def test_sizes_that_are_folded_with_the_batch(mode: FakeTensorMode) -> None:
    x = batched(mode, torch.empty(6, 4, 5))
    told = AnyBatch(mode).returned(aten.reshape.default, (x, [-1, 5]), {})
    assert told.shape == (4 * x.shape[0], 5)
    back = AnyBatch(mode)
    folded = back.returned(aten.reshape.default, (x, [-1, 5]), {})
    again = back.returned(aten.reshape.default, (folded, [-1, 4, 5]), {})
    assert again.shape[0].node.expr == x.shape[0].node.expr
    size = back.returned(aten.sym_size.int, (x, 0), {})
    assert size.node.expr == x.shape[0].node.expr


def test_a_batch_that_is_fixed() -> None:
    mode = FakeTensorMode()
    x = mode.from_tensor(torch.empty(2, 5, 3))
    told = AnyBatch(mode).returned(aten.mean.dim, (x, [1]), {})
    assert told.shape == (2, 3)
    assert told.fake_mode is mode


@pytest.mark.parametrize("what", ["two open sizes", "unbacked", "in proportion to its square"])
def test_what_depends_on_more_than_the_batch_is_run(what: str, mode: FakeTensorMode) -> None:
    if what == "two open sizes":
        x = batched(mode, torch.empty(6, 4, 5), dims=2)
        operator, args = aten.relu.default, (x,)
    elif what == "unbacked":
        with mode:
            x = torch.empty(mode.shape_env.create_unbacked_symint(), 5)
        operator, args = aten.relu.default, (x,)
    else:
        x = batched(mode, torch.empty(6, 4))
        operator, args = aten.mm.default, (x, x.t())
        square = aten.reshape.default
        args = (AnyBatch(mode).returned(operator, args, {}), [-1])
        operator = square
    with pytest.raises(NotTold):
        AnyBatch(mode).returned(operator, args, {})


def test_what_fits_one_batch_alone_is_run(mode: FakeTensorMode) -> None:
    """1009 tokens are as many as one of the batches that are tried."""
    x = batched(mode, torch.empty(6, 4))
    with pytest.raises(NotTold):
        AnyBatch(mode).returned(aten.add.Tensor, (x.t(), torch.empty(4, 1009)), {})


def test_numbers_of_other_types_are_other_calls() -> None:
    mode = FakeTensorMode()
    x = mode.from_tensor(torch.ones(2, dtype=torch.int64))
    dtypes = [
        AnyBatch(mode).returned(aten.add.Scalar, (x, one), {}).dtype for one in (1, 1.0, True)
    ]
    assert dtypes == [torch.int64, torch.float32, torch.int64]


def test_modes_are_part_of_a_call() -> None:
    mode = FakeTensorMode()
    x = mode.from_tensor(torch.ones(2, 3))
    found = []
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(AnyBatch(mode).returned(aten.linear.default, (x, x), {}).dtype)
    assert found == [torch.float32, torch.bfloat16, torch.float32]
    try:
        torch.set_default_dtype(torch.float64)
        counted = AnyBatch(mode).returned(aten.arange.default, (5.0,), {})
    finally:
        torch.set_default_dtype(torch.float32)
    assert counted.dtype == torch.float64
    assert AnyBatch(mode).returned(aten.arange.default, (5.0,), {}).dtype == torch.float32
