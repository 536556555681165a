"""What is computed twice is computed once; what must stay apart does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoders import Attention, Encoder, make, pixels
from functional import IMAGES, VALID, WEIGHT, captured
from torch import Tensor

import tomepass
from tomepass import ToMe, TomeBackend
from tomepass.capture import CanonicalGraph
from tomepass.subexpressions import merge_duplicates

aten = torch.ops.aten


def merged(function: Callable[..., Any]) -> CanonicalGraph:
    graph = captured(function)
    expected = graph.module(IMAGES.clone(), VALID, WEIGHT)
    merge_duplicates(graph.module)
    graph.graph.lint()
    graph.module.recompile()
    torch.testing.assert_close(
        graph.module(IMAGES.clone(), VALID, WEIGHT), expected, rtol=0, atol=0
    )
    return graph


def count(graph: CanonicalGraph, target: Any) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=target))


def test_equal_chains_become_one() -> None:
    def masks(x: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        one, two = (valid[:, None, None, :].expand(2, 1, 12, 12) for _ in range(2))
        parts = [x.chunk(2, -1)[1] for _ in range(2)]
        return (one & two).sum() + parts[0].sum() * parts[1].sum()

    graph = merged(masks)
    assert count(graph, aten.expand.default) == 1
    assert count(graph, aten.chunk.default) == 1
    assert count(graph, aten.sum.default) == 2


APART: dict[str, tuple[Any, Callable[..., Any]]] = {
    "random": (aten.rand_like.default, lambda x, v, w: torch.rand_like(x) - torch.rand_like(x)),
    "dropout": (aten.dropout.default, lambda x, v, w: F.dropout(x, 0.5) - F.dropout(x, 0.5)),
    "numbers of other kinds": (
        aten.add.Tensor,
        lambda x, v, w: (v.long() + 1, v.long() + 1.0, v.long() + True),
    ),
    "zeros of other signs": (aten.mul.Tensor, lambda x, v, w: (x * 0.0, x * -0.0)),
    "other keywords": (aten.add.Tensor, lambda x, v, w: (torch.add(x, x, alpha=2), x + x)),
    "written afterwards": (aten.relu.default, lambda x, v, w: (x.relu().add_(1), x.relu() * 2)),
    "written through a view": (
        aten.relu.default,
        lambda x, v, w: (x.relu().view(-1).add_(1), x.relu() * 2),
    ),
    "products": (aten.matmul.default, lambda x, v, w: x @ w - x @ w),
    "given to the user": (aten.relu.default, lambda x, v, w: (x.relu(), x.relu())),
    "given as a view": (aten.relu.default, lambda x, v, w: (x.relu(), x.relu().view(-1))),
    "uninitialised": (
        aten.new_empty.default,
        lambda x, v, w: (x.new_empty(2).fill_(1), x.new_empty(2).fill_(2)),
    ),
}


@pytest.mark.parametrize("name", APART)
def test_these_stay_apart(name: str) -> None:
    target, function = APART[name]
    graph = captured(function)
    before = count(graph, target)
    assert before > 1
    merge_duplicates(graph.module)
    assert count(graph, target) == before


def test_what_is_read_before_and_after_a_write_stays_apart() -> None:
    def model(x: Tensor, valid: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        first = y.relu()
        y.add_(1)
        return first + 1, y.relu() * 2

    assert count(merged(model), aten.relu.default) == 2


def test_one_that_leaves_and_one_that_does_not_are_one() -> None:
    graph = merged(lambda x, v, w: (x.relu(), x.relu() * 2))
    assert count(graph, aten.relu.default) == 1


class Expanding(Attention):
    """Each attention makes the same mask anew."""

    keep: list[Tensor]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.keep[0][:, None, None, :])


class Masked(Encoder):
    def __init__(self, **choices: Any) -> None:
        super().__init__(**choices)
        self.given: list[Tensor] = []
        for block in self.blocks:
            block.attention.__class__ = Expanding
            block.attention.keep = self.given

    def forward(self, pixels: Tensor, keep: Tensor) -> Any:
        self.given[:] = [keep]
        return super().forward(pixels)


@torch.no_grad()
def test_a_mask_expanded_in_each_attention_is_one_mask() -> None:
    model, x = make(Masked, depth=3), pixels(4)
    keep = torch.ones(4, 37, dtype=torch.bool)
    keep[:, 30:] = False
    merged_model = tomepass.apply(model, r=[4, 4], example_inputs=(x, keep))
    got = merged_model(x, keep)
    assert merged_model.report((x, keep)).streams[0].sides[-1].endswith("padding alone")
    # What padding holds does not show, merged or not.
    other = x.clone()
    other[:, :, -4:, 4:] = 0  # the last seven tokens see no other pixels
    torch.testing.assert_close(merged_model(other, keep), got, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged_model(other, torch.ones_like(keep)), got, atol=1e-2)
    compiled = torch.compile(model, backend=TomeBackend(ToMe([4, 4]), inner="eager"))
    torch.testing.assert_close(compiled(x, keep), got, rtol=1e-4, atol=1e-4)
