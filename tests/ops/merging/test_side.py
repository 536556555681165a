"""Tables and biases beside the tokens, against the plain reference and what they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from torch import Tensor

from tomepass import reference
from tomepass.ops.merging.side import keep, merge_bias, merge_rows, rows

TOKENS, LEFT = 13, 9


def keys(batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, 2, TOKENS, 4, generator=torch.Generator().manual_seed(seed))


def assignment(protected: tuple[int, ...] = (0,), seed: int = 0) -> Tensor:
    return reference.match(keys(seed=seed), TOKENS - LEFT, protected)


@examples(40)
@given(seed=st.integers(0, 1000), protected=st.sets(st.integers(0, TOKENS - 1), max_size=4))
def test_a_token_stands_where_the_destination_stood(seed: int, protected: set[int]) -> None:
    held = tuple(sorted(protected))
    r = reference.merge_count(TOKENS - LEFT, TOKENS, held)
    assign = reference.match(keys(seed=seed), r, held)
    kept = keep(None, assign, TOKENS - r, list(held))
    assert torch.equal(kept, reference.kept(assign, held, TOKENS - r))
    # Every token is sent where its own place is taken, and no place stands twice.
    assert torch.equal(assign.gather(1, kept), torch.arange(TOKENS - r).expand(3, -1))


def test_places_are_followed_through_merges() -> None:
    first = assignment()
    kept = keep(None, first, LEFT, [0])
    second = reference.match(torch.randn(3, 1, LEFT, 4), 3, (0,))
    again = keep(kept, second, LEFT - 3, [0])
    source = reference.compose(second, first)
    assert torch.equal(source.gather(1, again), torch.arange(LEFT - 3).expand(3, -1))


@pytest.mark.parametrize("shape", [(TOKENS, 5), (1, 1, TOKENS, 5), (3, 1, TOKENS, 5)])
def test_rows_are_those_of_the_places(shape: tuple[int, ...]) -> None:
    table, kept = torch.randn(shape), keep(None, assignment(), LEFT, [0])
    taken = rows(table, kept, 2, 4, [])
    assert taken.shape == (3, 1, LEFT, 5)
    for image in range(3):
        own = table.reshape(-1, TOKENS, 5)[image if len(shape) == 4 and shape[0] == 3 else 0]
        assert torch.equal(taken[image, 0], own[kept[image]])


def test_rows_of_the_patches_alone() -> None:
    table, kept = torch.randn(TOKENS - 2, 5), keep(None, assignment((0, 12)), LEFT, [0, 12])
    taken = rows(table, kept[:, 2:], 1, 3, [0, 12])
    assert torch.equal(taken, torch.stack([table[k - 1] for k in kept[:, 2:]]))


def test_the_mean_of_rows_is_what_merging_them_gives() -> None:
    table, assign = torch.randn(1, TOKENS, 5), assignment()
    merged = merge_rows(table, assign, LEFT)
    torch.testing.assert_close(merged, reference.merged_rows(table, assign, LEFT))
    x = torch.randn(3, TOKENS, 5)
    ones = torch.ones(3, TOKENS)
    before, _ = reference.merge(x + table, ones, assign, LEFT)
    after = reference.merge(x, ones, assign, LEFT)[0] + merged
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("leading", [(2,), (1, 2), (3, 1)])
def test_a_bias_is_the_references(leading: tuple[int, ...]) -> None:
    shape = (*leading, TOKENS, TOKENS)
    bias, assign = 3 * torch.randn(shape), assignment()
    wide = bias.reshape([1] * (4 - len(shape)) + list(shape))
    merged = merge_bias(bias, assign, LEFT)
    torch.testing.assert_close(merged, reference.merged_bias(wide, assign, LEFT))


def test_merged_keys_weigh_what_they_weighed_apart() -> None:
    bias, assign = 3 * torch.randn(1, 2, TOKENS, TOKENS), assignment()
    size = torch.stack([a.bincount(minlength=LEFT) for a in assign]).float()
    merged = merge_bias(bias[:, :, :1].expand(-1, -1, TOKENS, -1), assign, LEFT)
    weights = (merged + size.log()[:, None, None]).softmax(-1)[:, :, 0]
    apart = bias[:, :, 0].softmax(-1).expand(3, -1, -1)
    index = assign[:, None].expand(-1, 2, -1)
    together = torch.zeros(3, 2, LEFT).scatter_add(2, index, apart)
    torch.testing.assert_close(weights, together)


def test_a_large_bias_does_not_overflow() -> None:
    bias = torch.full((1, 1, TOKENS, TOKENS), 500.0)
    assert torch.equal(merge_bias(bias, assignment(), LEFT), torch.full((3, 1, LEFT, LEFT), 500.0))


def test_an_axis_of_one_is_left_alone() -> None:
    assign = assignment()
    for shape in ((1, 1, 1, TOKENS), (1, 1, TOKENS, 1)):
        merged = merge_bias(torch.randn(shape), assign, LEFT)
        assert merged.shape == (3, 1, *(LEFT if s > 1 else 1 for s in shape[2:]))


def test_gradients_reach_tables_and_biases() -> None:
    for function in (merge_rows, merge_bias):
        shape = (1, TOKENS, 5) if function is merge_rows else (1, 2, TOKENS, TOKENS)
        leaf = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t, f=function: f(t, assignment(), LEFT), leaf)
