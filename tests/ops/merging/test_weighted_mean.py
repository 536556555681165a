"""tome::weighted_mean: a mean that counts every token's size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge, merge_size
from tomepass.ops.merging.weighted_mean import weighted_mean


def plain(x: Tensor, size: Tensor) -> Tensor:
    """``[B, N, C]`` and ``[B, N]`` to ``[B, C]``, token by token in float64."""
    rows = [
        sum(float(s) * token.double() for s, token in zip(sizes, tokens, strict=True))
        / float(sizes.double().sum())
        for tokens, sizes in zip(x, size, strict=True)
    ]
    return torch.stack(rows)


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 5), st.integers(0, 10**6))
def test_it_is_the_mean_weighted_by_size(
    images: int, tokens: int, channels: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x, size = torch.randn(images, tokens, channels), torch.randint(1, 500, (images, tokens)).float()
    expected = plain(x, size).float()
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(weighted_mean(x, size, 1, False), expected, **close)
    torch.testing.assert_close(weighted_mean(x, size, 1, True), expected[:, None], **close)
    torch.testing.assert_close(weighted_mean(x.mT, size, 2, False), expected, **close)
    four = torch.stack([x, 2 * x], dim=1)
    both = torch.stack([expected, 2 * expected], dim=1)
    torch.testing.assert_close(weighted_mean(four, size, 2, False), both, **close)
    torch.testing.assert_close(weighted_mean(four, size, 2, True), both[:, :, None], **close)


def test_ones_give_the_plain_mean() -> None:
    x = torch.randn(2, 17, 5, dtype=torch.float64)
    torch.testing.assert_close(weighted_mean(x, torch.ones(2, 17), 1, False), x.mean(1))


def test_the_mean_after_merging_is_the_mean_before_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 33, 6, dtype=torch.float64)
    merged, size = x, None
    for tokens, r in ((33, 12), (21, 8), (13, 4)):
        assign = match(torch.randn(3, 1, tokens, 4), r, [])
        merged, size = merge(merged, size, assign, tokens - r), merge_size(size, assign, tokens - r)
    got = weighted_mean(merged, size, 1, False)
    torch.testing.assert_close(got, x.mean(1), rtol=1e-12, atol=1e-12)
    assert float((merged.mean(1) - x.mean(1)).abs().max()) > 1e-2  # or this test shows nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_is_summed_wide_and_returned_as_it_came(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, size = torch.randn(2, 700, 4).to(dtype), torch.randint(1, 300, (2, 700)).float()
    expected = plain(x, size)
    got = weighted_mean(x, size, 1, False)
    assert got.dtype is dtype
    # Relative to the largest token, from which the others are counted.
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}.get(dtype, torch.finfo(dtype).eps)
    largest = float(x.double().abs().max())
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * 0.1 * largest)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weighted_mean(x, size, 1, False), got)


def test_sizes_above_any_half_precision_are_counted() -> None:
    x = torch.tensor([[[0.0], [1.0]]], dtype=torch.float16)
    size = torch.tensor([[70_000.0, 210_000.0]])
    assert weighted_mean(x, size, 1, False).tolist() == [[0.75]]


def test_strides_do_not_matter() -> None:
    x, size = torch.randn(2, 8, 6), torch.randint(1, 9, (2, 8)).float()
    turned = x.transpose(0, 2).contiguous().transpose(0, 2)
    wide = torch.stack([size, size], dim=-1)[..., 0]
    expected = weighted_mean(x, size, 1, False)
    torch.testing.assert_close(weighted_mean(turned, wide, 1, False), expected)


def test_an_image_does_not_see_its_neighbours() -> None:
    x, size = torch.randn(3, 40, 6), torch.randint(1, 9, (3, 40)).float()
    mean = weighted_mean(x, size, 1, False)
    x[1:] = torch.nan
    assert torch.equal(weighted_mean(x, size, 1, False)[0], mean[0])


@pytest.mark.parametrize("keepdim", [True, False])
def test_gradients_are_right(keepdim: bool) -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    size = torch.randint(1, 9, (2, 5)).float()
    assert torch.autograd.gradcheck(lambda v: weighted_mean(v, size, 1, keepdim), (x,))
