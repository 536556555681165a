"""The CPU kernels against the composite operators: the same maps, the same sizes, no less exact."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from torch import Tensor

from benchmarks.gpu.operands import assignments
from tomepass import reference
from tomepass.counts.schedule import capped
from tomepass.kernels.cpu import match_cpu, merge_bias_cpu, merge_cpu, pad_keys_cpu
from tomepass.ops.attending.log_size import log_size
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge, merge_size
from tomepass.ops.merging.side import merge_bias
from tomepass.ops.padding import PADDED

NEXT_TO_NOTHING = PADDED * 1e-24


def heads(images: int, tokens: int, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Keys ``[B, 3, N, 24]`` as a projection leaves them."""
    torch.manual_seed(seed)
    return torch.randn(images, tokens, 3, 24).to(dtype).transpose(1, 2)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@examples(60)
@given(st.data())
def test_maps_equal_the_composite_s(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(4, 150), label="tokens")
    protected = data.draw(st.lists(st.integers(0, tokens - 1), max_size=5), label="protected")
    most = capped(tokens, tokens, tuple(sorted(set(protected))))
    r = data.draw(st.integers(1, max(most, 1)), label="r")
    if r > most:
        return
    images = data.draw(st.integers(1, 3), label="images")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), label="dtype")
    keys = heads(images, tokens, data.draw(st.integers(0, 2**30), label="seed"), dtype=dtype)
    size = None
    if data.draw(st.booleans(), label="padding"):
        size = torch.where(torch.rand(images, tokens) < 0.3, NEXT_TO_NOTHING, 1.0)
    expected = match(keys, r, protected, size)
    assert torch.equal(match_cpu(keys, r, protected, size), expected)


@pytest.mark.parametrize("r", [1, 7, 20])
def test_ties_go_to_the_lower_position(r: int) -> None:
    """Whole numbers with few values: many cosines are equal to the last bit."""
    torch.manual_seed(r)
    single = torch.randint(0, 2, (4, 1, 41, 16)).float()
    keys = torch.where(torch.rand(4, 1, 41, 1) < 0.7, single[:, :, :1], single)
    assert torch.equal(match_cpu(keys, r, [0]), match(keys, r, [0]))


def test_a_token_without_a_direction_merges_last() -> None:
    keys = heads(2, 22)
    keys[:, :, 4] = float("nan")
    keys[:, :, 5] = float("inf")
    keys[:, :, 8] = 0.0
    for r in (1, 5, 10):
        assert torch.equal(match_cpu(keys, r, [0]), match(keys, r, [0]))


def test_any_strides_will_do() -> None:
    keys = heads(2, 37)
    expected = match_cpu(keys.contiguous(), 9, [0])
    wide = torch.randn(2, 37, 3, 50)
    wide[..., 1:49:2] = keys.transpose(1, 2)
    strided = wide[..., 1:49:2].transpose(1, 2)
    assert strided.stride(3) == 2
    assert torch.equal(match_cpu(strided, 9, [0]), expected)
    x, size = torch.randn(2, 37, 10), torch.rand(2, 37) + 1
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    plain = merge_cpu(x, size, expected, 28)
    for got, wanted in zip(
        merge_cpu(turned, size.T.contiguous().T, expected.T.contiguous().T, 28), plain, strict=True
    ):
        assert torch.equal(got, wanted)


def test_results_do_not_depend_on_threads_or_batch(threads: None) -> None:
    keys, x = heads(5, 90, dtype=torch.bfloat16), torch.randn(5, 90, 70).bfloat16()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assign = match_cpu(keys, 30, [0])
        found.append((assign, *merge_cpu(x, None, assign, 60)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    alone = match_cpu(keys[3:4], 30, [0])
    assert torch.equal(alone, found[0][0][3:4])
    assert torch.equal(merge_cpu(x[3:4], None, alone, 60)[0], found[0][1][3:4])


@examples(60)
@given(st.data())
def test_merged_tokens_equal_the_reference(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 60), label="tokens")
    left = data.draw(st.integers(1, tokens), label="left")
    images = data.draw(st.integers(1, 3), label="images")
    width = data.draw(st.integers(1, 40), label="width")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), label="dtype")
    seed = data.draw(st.integers(0, 2**30), label="seed")
    torch.manual_seed(seed)
    x = torch.randn(images, tokens, width).to(dtype)
    assign = assignments(images, tokens, left, seed)
    size = torch.randint(1, 300, (images, tokens)).float()
    merged, merged_size = merge_cpu(x, size, assign, left)
    expected, expected_size = reference.merge(x.double(), size, assign, left)
    assert torch.equal(merged_size, expected_size)
    assert torch.equal(merged_size, merge_size(size, assign, left))
    # One rounding of the result, and a few of the sum: relative to the largest token.
    bound = {torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype] * x.double().abs().max()
    assert merged.dtype == dtype
    assert (merged.double() - expected).abs().max() <= bound
    ones = torch.ones_like(size)
    for got, wanted in zip(
        merge_cpu(x, None, assign, left), merge_cpu(x, ones, assign, left), strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_by_itself_and_equal_tokens_stay_bit_by_bit(dtype: torch.dtype) -> None:
    x = torch.randn(1, 3, 9).to(dtype)
    x[:, 2] = x[:, 1]
    x[:, 0, :2] = torch.tensor([float("nan"), float("inf")])
    merged, size = merge_cpu(x, torch.tensor([[3.0, 2.0, 2.0]]), torch.tensor([[0, 1, 1]]), 2)
    assert torch.equal(merged.view(torch.uint8), x[:, :2].contiguous().view(torch.uint8))
    assert size.tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_nothing_of_any_size_goes_there_is_nothing(dtype: torch.dtype) -> None:
    x = torch.randn(1, 6, 9).to(dtype)
    assign = torch.tensor([[0, 1, 1, 3, 4, 4]])
    size = torch.tensor([[2.0, 0.0, 3.0, 0.0, 0.0, 0.0]])
    merged, after = merge_cpu(x, size, assign, 5)
    assert after.tolist() == [[2.0, 3.0, 0.0, 0.0, 0.0]]
    assert merged[0, 2:].tolist() == [[0.0] * 9] * 3  # no token, one and two of no size
    expected = merge(x, size, assign, 5)
    torch.testing.assert_close(merged, expected)
    torch.testing.assert_close(merged[0, :2], x[0, [0, 2]])
    merged, after = merge_cpu(x, None, assign, 5)
    assert after.tolist() == [[1.0, 2.0, 0.0, 1.0, 2.0]]
    assert merged[0, 2].tolist() == [0.0] * 9


def test_a_bias_to_and_from_where_nothing_goes_is_nothing() -> None:
    bias = torch.randn(1, 3, 6, 6)
    source = torch.tensor([[0, 1, 1, 3, 4, 3], [0, 1, 2, 3, -1, 1]])
    got = merge_bias_cpu(bias, source, 5)
    torch.testing.assert_close(got, merge_bias(bias, source, 5))
    assert got[0, :, 2].abs().max() == got[1, :, :, 4].abs().max() == 0


def test_what_is_not_a_number_stays_none() -> None:
    x = torch.full((1, 2, 5), float("nan")).bfloat16()
    x[:, 1] = 1.0
    assert merge_cpu(x, None, torch.zeros(1, 2, dtype=torch.int64), 1)[0].isnan().all()


def test_more_than_can_merge_raises_as_the_composite_does() -> None:
    for operator in (match_cpu, match):
        with pytest.raises(ValueError, match="2 of 5 tokens can merge, 1 protected: got r=3"):
            operator(heads(1, 5), 3, [0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["projected", "contiguous", "strided"])
def test_padded_keys_are_the_padded_operands(dtype: torch.dtype, layout: str) -> None:
    keys, values = heads(3, 13, dtype=dtype), heads(3, 13, 1, dtype=dtype)
    if layout == "contiguous":
        keys, values = keys.contiguous(), values.contiguous()
    if layout == "strided":
        keys, values = (x.repeat_interleave(2, dim=3)[..., ::2] for x in (keys, values))
    size = torch.randint(1, 400, (3, 13)).float()
    size[1, 4] = NEXT_TO_NOTHING
    pad = torch.nn.functional.pad
    lowest = torch.finfo(dtype).min
    got = pad_keys_cpu(keys, values, size, 3)
    assert torch.equal(got[0], pad(keys, (0, 0, 0, 3)))
    assert torch.equal(got[1], pad(values, (0, 0, 0, 3)))
    expected = pad(log_size(size, keys), (0, 3), value=lowest)
    assert got[2].shape == expected.shape
    assert (got[2] == lowest).sum() == 3 * 3 + 1
    torch.testing.assert_close(got[2], expected, rtol=torch.finfo(dtype).eps, atol=0)


@examples(40)
@given(st.data())
def test_merged_biases_equal_the_composite_s(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(2, 40), label="tokens")
    left = data.draw(st.integers(1, tokens), label="left")
    shape = data.draw(st.sampled_from([(3,), (1, 3), (1, 1)]), label="heads")
    spread = data.draw(st.sampled_from([0.1, 3.0, 8.0]), label="spread")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), label="dtype")
    torch.manual_seed(data.draw(st.integers(0, 2**30), label="seed"))
    bias = (spread * torch.randn(*shape, tokens, tokens)).to(dtype)
    every, rest = torch.arange(left).expand(2, -1), torch.randint(0, left, (2, tokens - left))
    source = torch.cat([every, rest], 1)[:, torch.randperm(tokens)]
    got = merge_bias_cpu(bias, source, left)
    expected = merge_bias(bias.double(), source, left)
    assert got.dtype == dtype
    assert got.shape == expected.shape
    error = (got.double() - expected).abs().max() / bias.double().abs().max()
    assert error <= {torch.float32: 4e-6, torch.bfloat16: 2**-8}[dtype]


def test_a_bias_of_tokens_by_themselves_stays_bit_by_bit() -> None:
    bias = torch.randn(1, 2, 5, 5)
    source = torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    got = merge_bias_cpu(bias, source, 5)
    assert torch.equal(got[:1], bias)
    assert torch.equal(got[1:], bias.flip(2, 3))


def test_keys_that_a_bias_shuts_out_stay_shut_out() -> None:
    bias = torch.zeros(1, 1, 3, 3)
    bias[..., 1:] = -torch.inf
    got = merge_bias_cpu(bias, torch.tensor([[0, 1, 1]]), 2)
    assert got[0, 0].tolist() == [[0.0, -torch.inf], [0.0, -torch.inf]]


def test_operators_are_registered_as_torch_expects() -> None:
    keys, x = heads(2, 12), torch.randn(2, 12, 7)
    assign = match_cpu(keys, 4, [0])
    torch.library.opcheck(match_cpu, (keys, 4, [0]))
    torch.library.opcheck(match_cpu, (keys, 4, [0], torch.ones(2, 12)))
    torch.library.opcheck(merge_cpu, (x, None, assign, 8))
    torch.library.opcheck(merge_cpu, (x, torch.ones(2, 12), assign, 8))
    torch.library.opcheck(merge_bias_cpu, (torch.randn(1, 3, 12, 12), assign, 8))
    torch.library.opcheck(pad_keys_cpu, (keys, keys, torch.ones(2, 12), 4))
