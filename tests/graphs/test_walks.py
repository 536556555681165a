"""Reading a graph takes steps in proportion to its size, however many paths lead through it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functional import block, captured, residual
from torch import Tensor, fx

import tomepass
from tomepass import ToMe
from tomepass.graphs.canonical import CanonicalGraph
from tomepass.graphs.constants import constant_value, is_written
from tomepass.graphs.walks import answered
from tomepass.planning.plan_graph import plan_graph
from tomepass.reading.masks import is_padding
from tomepass.reading.origins import position_terms, trace_origins
from tomepass.rewriting import any_batch
from tomepass.rewriting.sweep import rewrite

aten = torch.ops.aten

HOME = str(Path(tomepass.__file__).parent)


class _TooMany(Exception):
    pass


def steps(work: Callable[[], Any], limit: int | None = None) -> int:
    """How often functions of the package are called; no further than to a limit."""
    count = 0

    def counting(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            count += 1
            if limit is not None and count > limit:
                raise _TooMany

    sys.setprofile(counting)
    try:
        work()
    except _TooMany:
        pass
    finally:
        sys.setprofile(None)
    return count


def before(layers: int) -> Callable[..., Any]:
    """Token-wise residual layers before the first attention."""

    def model(x: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        return block(block(residual(x, layers), weight), weight)[:, 0]

    return model


def between(layers: int) -> Callable[..., Any]:
    def model(x: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        return block(residual(block(x, weight), layers), weight)[:, 0]

    return model


def folded(layers: int) -> Callable[..., Any]:
    """Behind the last block, tokens folded with the batch, which are unmerged before their fold."""

    def model(x: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        x = block(block(x, weight), weight)
        return residual(x.reshape(-1, 8), layers).flip(0)

    return model


def mask(layers: int) -> Callable[..., Any]:
    """A padding mask made of many others."""

    def model(x: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        seen = valid[:, None, None].expand(2, 1, 12, 12)
        for _ in range(layers):
            seen = seen & (seen | seen)
        return block(block(x, weight, seen), weight, seen)[:, 0]

    return model


def bias(layers: int) -> Callable[..., Any]:
    """A position bias made of many others, of constants and of what is learned."""

    def model(x: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        place = residual(torch.arange(12.0) / 100, layers)
        table = residual(weight[:, 0].repeat(2)[:12], layers) + (place[:, None] - place)
        return block(block(x, weight, table), weight, table)[:, 0]

    return model


def foreign(layers: int) -> Callable[..., Any]:
    """A sum, of many sums, of an attention and of what it was not computed from."""

    def model(x: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        other = x.flip(1)
        for _ in range(layers):
            other = other + other
        y = F.layer_norm(x * 2, (8,))[:, None]
        return (other + F.scaled_dot_product_attention(y, y, y)[:, 0])[:, 0]

    return model


def written(layers: int) -> Callable[..., Any]:
    """Writes in place, through views of views."""

    def model(x: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        x = block(x, weight)
        for _ in range(layers):
            x = F.linear(x, weight).view(2, 12, 8).transpose(0, 1).transpose(0, 1).add_(1)
        return block(x, weight)[:, 0]

    return model


def read(graph: CanonicalGraph) -> None:
    any_batch._result.cache_clear()  # what was found for another graph would save steps
    planned = plan_graph(graph, ToMe(2))
    if planned.streams:
        rewrite(graph, planned)


@pytest.mark.parametrize(
    "model", [before, between, folded, mask, bias, foreign, written], ids=lambda m: m.__name__
)
def test_each_layer_takes_as_many_steps_as_the_last(model: Callable[[int], Any]) -> None:
    graphs = [captured(model(layers)) for layers in (10, 20, 30)]
    few, more, most = (steps(lambda graph=graph: read(graph), 80_000) for graph in graphs)
    assert 0 < most - more < 1.2 * (more - few), (few, more, most)


def test_these_are_what_they_say() -> None:
    """The stems merge, or are refused for what they are made to be."""
    for model in (before, between, folded, mask, bias):
        assert plan_graph(captured(model(2)), ToMe(2)).streams, model.__name__
    (refused,) = plan_graph(captured(foreign(2)), ToMe(2)).mismatches
    assert "this sum adds another value" in refused.reason


def repeated(node: fx.Node, target: Any, *more: Any, times: int = 1000) -> fx.Node:
    """An operator of the same shape over and over."""
    before = node
    for _ in range(times):
        with node.graph.inserting_after(node):
            made = node.graph.call_function(target, (node, *(more or (node,))))
        made.meta = dict(before.meta)
        node = made
    return node


def test_nothing_is_too_deep() -> None:
    """Python takes some hundred calls within calls; a graph may be as deep as it likes."""

    def model(x: Tensor, valid: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return x + 1, valid[:, None, None].expand(2, 1, 12, 12), torch.arange(12.0)

    graph = captured(model)
    x, seen, table = graph.graph.output_node().all_input_nodes
    deep = repeated(x, aten.add.Tensor, 1)
    assert trace_origins(deep, 1, graph.data).from_input == (True,) * 12
    assert position_terms(deep, 1, graph.data) == ()
    assert is_padding(repeated(seen, aten.logical_and.default))
    constant = constant_value(repeated(table, aten.mul.Tensor, 1.0))
    assert constant is not None
    assert constant.tolist() == list(range(12))
    assert is_written(repeated(x, aten.view.default, [2, 12, 8])) is False


def test_each_place_is_answered_once_and_after_those_it_needs() -> None:
    asked: list[int] = []
    known: dict[int, int] = {}

    def needs(place: int) -> list[int]:
        return [place - 1, place - 2] if place > 1 else []

    def answer(place: int) -> int:
        asked.append(place)
        return sum(known[other] for other in needs(place)) or 1

    answered(3000, known, needs, answer)
    assert [known[place] for place in range(8)] == [1, 1, 2, 3, 5, 8, 13, 21]
    assert sorted(asked) == list(range(3001))
    assert answered(2000, known, needs, answer) == known[2000]
    assert len(asked) == 3001
