"""Padding: next to no size, apart from real tokens, out of every attention."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass import reference
from tomepass.ops.attending.log_size import log_size
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge, merge_size
from tomepass.ops.padding import PADDED, padded_size

TOKENS = 16


def mask(lengths: list[int]) -> Tensor:
    seen = torch.arange(TOKENS)[None] < torch.tensor(lengths)[:, None]
    return seen[:, None, None].expand(-1, 1, TOKENS, TOKENS)


def tokens(images: int) -> Tensor:
    return torch.empty(images, TOKENS, 3)


def test_real_tokens_count_one_and_padding_next_to_nothing() -> None:
    size = padded_size(mask([16, 10]), tokens(2))
    assert size.dtype == torch.float32
    assert torch.equal(size[0], torch.ones(TOKENS))
    assert torch.equal(size[1, :10], torch.ones(10))
    assert 0 < float(size[1, 10:].max()) < PADDED


def test_padding_merges_with_padding_alone() -> None:
    torch.manual_seed(0)
    keys = torch.randn(3, 2, TOKENS, 4)
    keys[:, :, 9] = keys[:, :, 10]  # the most alike are a real token and a padded one
    size = padded_size(mask([16, 10, 7]), tokens(3))
    assign = match(keys, 4, [0], size)
    assert torch.equal(assign, reference.match(keys, 4, (0,), padding=size < PADDED))
    assert not torch.equal(assign, match(keys, 4, [0]))
    for image, length in enumerate((16, 10, 7)):
        assert not set(assign[image, :length].tolist()) & set(assign[image, length:].tolist())


def test_merged_padding_is_still_a_number_and_still_left_out() -> None:
    size = padded_size(mask([6]), tokens(1))
    assign = reference.match(torch.randn(1, 1, TOKENS, 4), 7, (), padding=size < PADDED)
    x = torch.randn(1, TOKENS, 3)
    assert merge(x, size, assign, 9).isfinite().all()
    after = merge_size(size, assign, 9)
    hidden = after < PADDED
    assert 0 < int(hidden.sum()) < 9
    weights = log_size(after, torch.empty(1, 1, 9, 4)).softmax(-1).flatten()
    assert torch.equal(weights[hidden[0]], torch.zeros(int(hidden.sum())))
    assert float(after.sum()) == 6


def test_a_real_token_forced_onto_padding_stays_what_it_was() -> None:
    size = padded_size(mask([1]), tokens(1))
    x = torch.randn(1, TOKENS, 3)
    assign = match(torch.randn(1, 1, TOKENS, 4), 8, [], size)  # the cap: every even token merges
    merged = merge(x, size, assign, 8)
    torch.testing.assert_close(merged[0, assign[0, 0]], x[0, 0])
