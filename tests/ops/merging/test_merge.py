"""tome::merge and tome::merge_size against the plain reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.gpu.operands import assignments
from tomepass import reference
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge, merge_size

# Of a weighted mean, relative to the largest token: the weights and the result are rounded.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def sizes(images: int, tokens: int, largest: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, largest + 1, (images, tokens), generator=generator).float()


def rounding(x: Tensor, got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).abs().max() / x.double().abs().max())


@settings(deadline=None)
@given(st.data())
def test_merged_tokens_and_sizes_equal_the_reference(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 40), label="tokens")
    left = data.draw(st.integers(1, tokens), label="left")
    images = data.draw(st.integers(1, 3), label="images")
    channels = data.draw(st.integers(1, 9), label="channels")
    largest = data.draw(st.sampled_from([1, 2, 300, 50_000]), label="largest size")
    seed = data.draw(st.integers(0, 2**30), label="seed")
    torch.manual_seed(seed)
    x = torch.randn(images, tokens, channels)
    assign, size = assignments(images, tokens, left, seed), sizes(images, tokens, largest, seed)

    expected, expected_size = reference.merge(x.double(), size, assign, left)
    assert rounding(x, merge(x, size, assign, left), expected) < TOLERANCE[torch.float32]
    assert torch.equal(merge_size(size, assign, left), expected_size)

    ones = torch.ones_like(size)
    assert torch.equal(merge(x, None, assign, left), merge(x, ones, assign, left))
    assert torch.equal(merge_size(None, assign, left), merge_size(ones, assign, left))


def test_a_merge_worked_by_hand() -> None:
    x = torch.tensor([[[1.0, 0.0], [4.0, 8.0], [7.0, 1.0]]])
    size, assign = torch.tensor([[1.0, 3.0, 5.0]]), torch.tensor([[1, 1, 0]])
    assert merge(x, size, assign, 2).tolist() == [[[7.0, 1.0], [3.25, 6.0]]]
    assert merge_size(size, assign, 2).tolist() == [[5.0, 4.0]]


def test_the_total_is_kept_through_many_merges() -> None:
    torch.manual_seed(0)
    x, size = torch.randn(3, 65, 8, dtype=torch.float64), None
    total = x.sum(1)
    for tokens, r in ((65, 20), (45, 20), (25, 12), (13, 6)):
        assign = match(torch.randn(3, 2, tokens, 4), r, [0])
        x, size = merge(x, size, assign, tokens - r), merge_size(size, assign, tokens - r)
        torch.testing.assert_close((x * size[..., None]).sum(1), total)
        assert size.sum(1).tolist() == [65.0] * 3
        assert size[:, 0].tolist() == [1.0] * 3


def test_merging_equal_tokens_changes_no_bit_of_a_single_one_and_little_of_many() -> None:
    torch.manual_seed(1)
    kinds = torch.randn(1, 3, 16)
    x, assign = kinds[:, [0, 1, 2, 1, 1, 2]], torch.tensor([[0, 1, 2, 1, 1, 2]])
    merged = merge(x, None, assign, 3)
    assert torch.equal(merged[:, 0], kinds[:, 0])
    torch.testing.assert_close(merged, kinds, rtol=3e-7, atol=0)


# Precision


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dtype_is_as_exact_as_its_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x, assign, size = (
        torch.randn(2, 40, 16).to(dtype),
        assignments(2, 40, 13, 2),
        sizes(2, 40, 9, 2),
    )
    for given_size in (size, None):
        merged = merge(x, given_size, assign, 13)
        assert merged.dtype is dtype
        expected, _ = reference.merge(
            x.double(), size if given_size is not None else torch.ones(2, 40), assign, 13
        )
        assert rounding(x, merged, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sizes_no_low_precision_could_hold_stay_exact(dtype: torch.dtype) -> None:
    # bfloat16 cannot hold 257, float16 neither 2049 nor 70000; float32 all up to 2**24.
    size = torch.tensor([[257.0, 2049.0, 70_000.0, 2.0**24 - 70_001]])
    assign = torch.tensor([[0, 1, 2, 2]])
    merged = merge_size(size, assign, 3)
    assert merged.dtype is torch.float32
    assert merged.tolist() == [[257.0, 2049.0, 2.0**24 - 1]]
    x = torch.tensor([[[1.0], [2.0], [4.0], [4.0]]]).to(dtype)
    assert merge(x, size, assign, 3).flatten().tolist() == [1.0, 2.0, 4.0]


def test_counts_above_256_are_exact_after_repeated_merging() -> None:
    size = None
    for tokens in (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2):
        assign = torch.arange(tokens)[None] // 2
        size = merge_size(size, assign, tokens // 2)
    assert size.tolist() == [[1024.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_neither_values_nor_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x, assign, size = (
        torch.randn(2, 40, 16).to(dtype),
        assignments(2, 40, 13, 3),
        sizes(2, 40, 999, 3),
    )
    merged, merged_size = merge(x, size, assign, 13), merge_size(size, assign, 13)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(merge(x, size, assign, 13), merged)
        assert merge(x, size, assign, 13).dtype is dtype
        assert torch.equal(merge_size(size, assign, 13), merged_size)
        assert merge_size(size, assign, 13).dtype is torch.float32


# Layout and neighbours


def test_strides_do_not_matter() -> None:
    torch.manual_seed(4)
    x, assign, size = torch.randn(3, 20, 8), assignments(3, 20, 11, 4), sizes(3, 20, 7, 4)
    expected = merge(x, size, assign, 11)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    strided = torch.stack([x, -x], dim=2).flatten(1, 2)[:, ::2]
    for same in (turned, strided):
        assert not same.is_contiguous()
        torch.testing.assert_close(merge(same, size, assign, 11), expected, rtol=1e-6, atol=1e-6)
    wide = torch.stack([assign, assign], dim=-1)[..., 0]
    tall = torch.stack([size, size])[1]
    assert torch.equal(merge(x, tall, wide, 11), expected)
    assert torch.equal(merge_size(tall, wide, 11), merge_size(size, assign, 11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_again_whatever_the_neighbours(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    x, assign, size = (
        torch.randn(4, 50, 24).to(dtype),
        assignments(4, 50, 30, 5),
        sizes(4, 50, 9, 5),
    )
    merged = merge(x, size, assign, 30)
    assert torch.equal(merge(x, size, assign, 30), merged)
    other_x, other_assign, other_size = (v.clone() for v in (x, assign, size))
    other_x[1:] = torch.nan
    other_assign[1:] = assignments(3, 50, 30, 6)
    other_size[1:] = 1.0
    assert torch.equal(merge(other_x, other_size, other_assign, 30)[0], merged[0])


# Gradients


def test_gradients_reach_the_tokens_by_weight_and_stop_at_the_sizes() -> None:
    x = torch.zeros(1, 3, 1, requires_grad=True)
    size = torch.tensor([[1.0, 3.0, 1.0]], requires_grad=True)
    assign = torch.tensor([[1, 1, 0]])
    merge(x, size, assign, 2).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [0.25, 0.75, 1.0]
    assert size.grad is None
    assert not merge_size(size, assign, 2).requires_grad


@pytest.mark.parametrize("sized", [True, False])
def test_gradients_are_right(sized: bool) -> None:
    torch.manual_seed(6)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    assign, size = assignments(2, 9, 4, 6), sizes(2, 9, 5, 6) if sized else None
    assert torch.autograd.gradcheck(lambda v: merge(v, size, assign, 4), (x,))
    assert torch.autograd.gradgradcheck(lambda v: merge(v, size, assign, 4) ** 2, (x,))
