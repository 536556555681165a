"""Writes in place are followed where they are plain results, and refused elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from tracing import capture

from tomepass.reading.writes import hidden_write


def _found(function: Callable[[Tensor], Tensor]) -> fx.Node | None:
    graph = capture(function, torch.randn(2, 4, 4)).graph
    data = frozenset(n.name for n in graph.find_nodes(op="placeholder"))
    return hidden_write(graph, data)


def _assigned(x: Tensor) -> Tensor:
    made = x.new_zeros(2, 5, 4)
    made[:, 1:] = x
    return made * 2


def _view_read_after(x: Tensor) -> Tensor:
    y = x * 2
    first = y[:, 0]
    y.add_(1)
    return first


@pytest.mark.parametrize("function", [_assigned, _view_read_after])
def test_a_write_that_readers_do_not_show_is_found(function: Callable[[Tensor], Tensor]) -> None:
    assert _found(function) is not None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * 2).relu_() + x,
        lambda x: torch.nn.functional.dropout((x @ x).add_(x), 0.0),
        lambda x: x + torch.zeros(4).fill_(2),
    ],
)
def test_a_write_nobody_else_reads_is_a_plain_result(function: Callable[[Tensor], Tensor]) -> None:
    assert _found(function) is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x.flatten(0, 1) @ x[0]).view(2, 4, 4).add_(1),
        lambda x: (x * 2).view(8, 4).relu_().view(2, 4, 4),
    ],
)
def test_a_write_through_a_view_of_what_is_not_read_again_is_a_plain_result(
    function: Callable[[Tensor], Tensor],
) -> None:
    assert _found(function) is None


def _base_read_after(x: Tensor) -> Tensor:
    y = x * 2
    y.view(8, 4).add_(1)
    return y


def _input_written(x: Tensor) -> Tensor:
    return x.view(8, 4).add_(1)


@pytest.mark.parametrize("function", [_base_read_after, _input_written])
def test_a_write_through_a_view_of_what_is_read_again_is_found(
    function: Callable[[Tensor], Tensor],
) -> None:
    assert _found(function) is not None
