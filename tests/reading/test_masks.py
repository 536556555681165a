"""Which masks hide nothing, hide padding, or only say where tokens stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from tomepass.capture.idle_masks import hides_nothing
from tomepass.graphs.canonical import CanonicalGraph
from tomepass.reading.masks import is_padding, is_position_bias

N = 6


def traced(function: Callable[..., Any], *inputs: Tensor) -> tuple[fx.Node, fx.GraphModule]:
    module = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs)
    (result,) = module.graph.output_node().all_input_nodes
    return result, module


def bias_of(function: Callable[..., Any], *inputs: Tensor, learned: tuple[int, ...] = (0,)) -> bool:
    """Is what a function makes of parameters (``learned``) and inputs (the others) a bias?"""
    result, module = traced(function, *inputs)
    names = [n.name for n in module.graph.find_nodes(op="placeholder")]
    parameters = frozenset(names[i] for i in learned)
    captured = CanonicalGraph(module, frozenset(names) - parameters, False, parameters)
    return is_position_bias(result, captured)


TABLE = torch.randn(2 * N - 1, 3)


def relative(table: Tensor) -> Tensor:
    place = torch.arange(N)
    return table[(place[:, None] - place + N - 1).flatten()].view(N, N, -1).permute(2, 0, 1)


def test_a_relative_position_table_is_a_bias() -> None:
    assert bias_of(relative, TABLE)
    assert bias_of(lambda t: relative(t).unsqueeze(0).expand(2, -1, -1, -1) * 16, TABLE)
    assert bias_of(lambda t: relative(t) + torch.ones(N, N, dtype=torch.bool), TABLE)
    # A constant boolean chooses between finite values.
    chosen = lambda t: torch.where(torch.arange(N) > 3, relative(t), 0.5 * relative(t))  # noqa: E731
    assert bias_of(chosen, TABLE)


@pytest.mark.parametrize(
    "function",
    [
        lambda t: relative(t) + torch.full((N, N), -torch.inf).triu(1),
        lambda t: relative(t) + torch.full((N, N), -1e9).triu(1),
        lambda t: relative(t).masked_fill(torch.ones(N, N).triu(1) > 0, -1e9),
        lambda t: torch.where(torch.ones(N, N).tril() > 0, relative(t), -3.4e38),
        lambda t: torch.where(torch.ones(N, N).tril() > 0, relative(t), torch.tensor(-torch.inf)),
        lambda t: relative(t) > 0,
    ],
)
def test_what_hides_something_is_no_bias(function: Callable[[Tensor], Tensor]) -> None:
    assert not bias_of(function, TABLE)


def test_what_is_written_into_or_given_is_no_bias() -> None:
    def written(table: Tensor) -> Tensor:
        made = relative(table).clone()
        made[0, 0, 1] = -torch.inf
        return made

    assert not bias_of(written, TABLE)
    assert not bias_of(relative, TABLE, learned=())
    assert not bias_of(lambda t, x: relative(t) + x, TABLE, torch.randn(N, N))


def mask_of(function: Callable[..., Tensor], *inputs: Tensor) -> bool:
    return is_padding(traced(function, *inputs)[0])


VALID = torch.ones(2, N, dtype=torch.long)


def test_a_mask_alike_for_all_queries_is_padding() -> None:
    assert mask_of(lambda v: v.bool()[:, None, None].expand(2, 1, N, N), VALID)
    assert mask_of(lambda v: (v[:, None, None] > 0).expand(2, 1, N, N), VALID)

    def gathered(v: Tensor) -> Tensor:
        image, key = torch.arange(2)[:, None, None, None], torch.arange(N)[None, None, None]
        query = torch.arange(N)[None, None, :, None] >= 0
        return (v.bool()[image, key] & query).expand(2, 1, N, N)

    assert mask_of(gathered, VALID)


@pytest.mark.parametrize(
    "function",
    [
        lambda v: v.bool()[:, None, :, None].expand(2, 1, N, N),  # hides queries
        lambda v: v.bool()[:, None, None] & torch.ones(N, N).tril().bool(),
        lambda v: (v[:, None, :, None] == v[:, None, None]).expand(2, 1, N, N),  # packed
        lambda v: v.float()[:, None, None].expand(2, 1, N, N),  # not boolean
        lambda v: v.bool()[:, None].expand(2, N, N),  # not four dimensions
        lambda v: v.bool()[:, None, None].expand(2, 1, N, N).roll(1, 2) & (v > 0)[:, None, :, None],
    ],
)
def test_a_mask_that_differs_between_queries_is_none(function: Callable[[Tensor], Tensor]) -> None:
    assert not mask_of(function, VALID)


def test_a_repeated_constant_hides_nothing_whatever_it_is_repeated_for() -> None:
    def repeated(x: Tensor) -> Tensor:
        seen = (torch.arange(N) >= 0)[None, None, None].expand(x.shape[0], 1, N, N)
        return torch.where(seen, torch.zeros(()), -torch.inf)

    module = make_fx(repeated, tracing_mode="symbolic", pre_dispatch=True)(torch.randn(3, 2))
    (result,) = module.graph.output_node().all_input_nodes
    assert hides_nothing(result)


def test_a_repeated_constant_that_hides_one_key_is_seen_to() -> None:
    def repeated(x: Tensor) -> Tensor:
        seen = (torch.arange(N) > 0)[None, None, None].expand(x.shape[0], 1, N, N)
        return torch.where(seen, torch.zeros(()), -torch.inf)

    module = make_fx(repeated, tracing_mode="symbolic", pre_dispatch=True)(torch.randn(3, 2))
    (result,) = module.graph.output_node().all_input_nodes
    assert not hides_nothing(result)
