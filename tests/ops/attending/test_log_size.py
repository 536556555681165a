"""tome::log_size: the bias that makes one merged key count as many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tomepass import reference
from tomepass.ops.attending.log_size import log_size

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def random_sizes(images: int, tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 400, (images, tokens), generator=generator).float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bias_is_the_logarithm_in_the_dtype_of_the_query(dtype: torch.dtype) -> None:
    size, query = random_sizes(2, 30, 0), torch.empty(2, 3, 30, 8, dtype=dtype)
    bias = log_size(size, query)
    assert bias.shape == (2, 1, 1, 30)
    assert bias.dtype is dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        bias[:, 0, 0].double(), size.double().log(), rtol=2 * rounding, atol=2 * rounding
    )


def test_a_token_of_one_gets_no_bias_and_one_of_nothing_is_left_out() -> None:
    bias = log_size(torch.tensor([[1.0, 0.0]]), torch.empty(1, 1, 2, 4))
    assert bias.flatten().tolist() == [0.0, torch.finfo(torch.float32).min]


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 20), st.integers(0, 10**6))
def test_attention_with_it_equals_the_reference(
    images: int, heads: int, tokens: int, seed: int
) -> None:
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, images, heads, tokens, 8).unbind(0)
    size = random_sizes(images, tokens, seed)
    got = scaled_dot_product_attention(q, k, v, attn_mask=log_size(size, q))
    torch.testing.assert_close(got, reference.proportional_attention(q, k, v, size))


def test_attention_with_it_is_attention_to_the_copies_themselves() -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 2, 3, 5, 8, dtype=torch.float64).unbind(0)
    copies = torch.tensor([1, 4, 2, 1, 300])
    full_k, full_v = (t.repeat_interleave(copies, dim=2) for t in (k, v))
    bias = log_size(copies.float().expand(2, -1), q)
    got = scaled_dot_product_attention(q, k, v, attn_mask=bias)
    # In float64 throughout: a logarithm rounded to float32 would be off by 1e-7.
    expected = scaled_dot_product_attention(q, full_k, full_v)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_sizes_are_not_rounded_before_the_logarithm() -> None:
    # 70000 is infinite in float16, 257 is 256 in bfloat16.
    half = log_size(torch.tensor([[70_000.0]]), torch.empty(1, 1, 1, 1, dtype=torch.float16))
    assert half.item() == pytest.approx(11.156, abs=0.01)
    size = torch.tensor([[257.0, 256.0]])
    with torch.autocast("cpu", torch.bfloat16):
        one, other = log_size(size, torch.empty(1, 1, 1, 1)).flatten().tolist()
    assert one - other == pytest.approx(1 / 256, rel=0.01)


def test_no_gradient_flows_to_sizes_or_query() -> None:
    size = torch.ones(1, 3, requires_grad=True)
    assert not log_size(size, torch.empty(1, 1, 3, 4, requires_grad=True)).requires_grad


def test_heads_folded_into_the_batch_repeat_it() -> None:
    size = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    bias = log_size(size, torch.empty(6, 5, 2), 2, 3)
    assert bias.shape == (6, 1, 2)
    assert torch.equal(bias.exp().round()[:, 0], size.repeat_interleave(3, 0))


def test_keys_may_stand_on_any_dimension() -> None:
    assert log_size(torch.ones(2, 7), torch.empty(2, 7, 1), 1).shape == (2, 7, 1)
