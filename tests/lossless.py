"""The oracle of duplicates: where tokens are alike, merging them must change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from encoders import with_zero_positions
from torch import Tensor, fx, nn
from zoo import relative_error

import tomepass
from tomepass import ToMe, TomeBackend
from tomepass.capture.captured import read_state
from tomepass.graphs.canonical import CanonicalGraph
from tomepass.methods import Method
from tomepass.ops.library import is_overhead
from tomepass.planning.costs import stream_costs
from tomepass.planning.macs import batch_of, macs_by_name, node_macs
from tomepass.planning.plan_graph import plan_graph
from tomepass.planning.streams import Planned
from tomepass.rewriting.sweep import rewrite

LOSSLESS = 1e-4


def tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors of an output."""
    found = pytree.tree_leaves(outputs)
    return [v for v in found if isinstance(v, Tensor) and v.is_floating_point()]


def errors(ours: Any, theirs: Any) -> list[float]:
    """Relative errors of corresponding tensors, shapes compared."""
    return [relative_error(a, b) for a, b in zip(tensors(ours), tensors(theirs), strict=True)]


def rewritten(
    graph: CanonicalGraph, method: ToMe, *, partly: bool = False, **options: Any
) -> fx.GraphModule:
    """The graph with merges; ``partly``: some of its attentions may be left alone."""
    planned = plan_graph(graph, method)
    assert partly or not planned.mismatches, planned.mismatches
    return rewrite(graph, planned, **options).module


def assert_macs_are_foretold(
    graph: CanonicalGraph,
    method: Method,
    module: fx.GraphModule,
    planned: Planned | None = None,
) -> None:
    """What a plan saves, told from the captured graph, is what the rewritten one has."""
    macs, planned = macs_by_name(graph), planned or plan_graph(graph, method)
    saved = [stream_costs(graph, stream, macs).saved(stream.plan) for stream in planned.streams]
    assert all(s > 0 for s in saved)
    left = sum(node_macs(n) for n in module.graph.nodes if not is_overhead(n)) / batch_of(graph)
    assert sum(macs.values()) - sum(saved) == pytest.approx(left, rel=1e-9)


def calls(module: fx.GraphModule, target: Any) -> list[fx.Node]:
    """The nodes that call an operator."""
    return list(module.graph.find_nodes(op="call_function", target=target))


def assert_r0_is_the_original(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Bit for bit, in both doors."""
    expected = tensors(model(**inputs))
    merged = tomepass.apply(model, r=0, example_inputs=inputs)
    backend = torch.compile(model, backend=TomeBackend(ToMe(0), inner="eager"))
    for outputs in (merged(**inputs), backend(**inputs)):
        for ours, theirs in zip(tensors(outputs), expected, strict=True):
            assert torch.equal(ours, theirs)


@torch.no_grad()
def assert_lossless(
    model: nn.Module, inputs: dict[str, Any], r: list[int], *, control: float = 1e-3
) -> None:
    """Merged is unmerged on duplicates; without proportional attention it is not."""
    with_zero_positions(model)
    expected = model(**inputs)
    merged = tomepass.apply(model, r=r, example_inputs=inputs)
    outputs = merged(**inputs)
    assert type(outputs) is type(expected)
    assert max(errors(outputs, expected)) < LOSSLESS
    capture = merged.captured(inputs).capture
    unweighted = rewritten(capture.graph, ToMe(r, prop_attn=False), partly=True)
    values = [*read_state(model, capture), *pytree.tree_leaves(inputs)]
    assert max(errors(unweighted(*values), expected)) > control
