"""What is computed twice is computed once; what must stay apart does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoders import Encoder, make, pixels
from functional import IMAGES, VALID, WEIGHT, captured
from torch import Tensor

import tomepass
from tomepass import ToMe, TomeBackend
from tomepass.capture.subexpressions import merge_duplicates
from tomepass.graphs.canonical import CanonicalGraph

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
        lambda x, v, w: ((v.long() + 1).abs(), (v.long() + 1.0).abs(), (v.long() + True).abs()),
    ),
    # What is given to the user itself would stay apart anyway.
    "zeros of other signs": (aten.mul.Tensor, lambda x, v, w: 1 / (x * 0.0) - 1 / (x * -0.0)),
    "other keywords": (aten.add.Tensor, lambda x, v, w: torch.add(x, x, alpha=2) * (x + x)),
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


class Masked(Encoder):
    """Each attention makes the same mask anew, or is given one that was made before."""

    once = False

    def forward(self, pixels: Tensor, keep: Tensor) -> Any:
        x, mask = self.embed(pixels), keep[:, None, None, :]
        for block in self.blocks:
            seen = mask if self.once else keep[:, None, None, :]
            q, k, v = block.attention.heads(block.norm1(x))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            x = x + block.attention.out(y.transpose(1, 2).reshape(x.shape))
            x = x + block.mlp(block.norm2(x))
        return self.read(self.final(x))


class MaskedOnce(Masked):
    once = True


@torch.no_grad()
def test_a_mask_expanded_in_each_attention_is_one_mask() -> None:
    x, keep = pixels(4), torch.ones(4, 37, dtype=torch.bool)
    keep[:, 30:] = False
    anew, once = make(Masked, depth=3), make(MaskedOnce, depth=3)
    ours, theirs = (tomepass.apply(m, r=[4, 4], example_inputs=(x, keep)) for m in (anew, once))
    assert torch.equal(ours(x, keep), theirs(x, keep))
    assert not torch.allclose(ours(x, torch.ones_like(keep)), ours(x, keep), atol=1e-2)
    compiled = torch.compile(anew, backend=TomeBackend(ToMe([4, 4]), inner="eager"))
    torch.testing.assert_close(compiled(x, keep), ours(x, keep), rtol=1e-4, atol=1e-4)
