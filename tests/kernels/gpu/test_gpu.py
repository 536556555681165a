"""The Triton kernels in Triton's interpreter, against the composite operators."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from depth import in_turn
from torch import Tensor

from benchmarks.gpu.checks import (
    DTYPES,
    NEXT_TO_NOTHING,
    check_gradients,
    check_map,
    check_merge,
    check_norm,
    check_norm_gradients,
    check_registrations,
    check_strided_keys,
    check_strided_tokens,
    check_sums,
)
from benchmarks.gpu.operands import assignments, counts, even_cosines, heads
from tomepass.kernels.gpu import match as gpu_match
from tomepass.kernels.gpu.match import match_triton
from tomepass.kernels.gpu.merge import merge_norm_triton, merge_triton, sum_triton, unmerge_triton
from tomepass.kernels.gpu.sources import sources_triton
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge, merge_size
from tomepass.ops.merging.unmerge import unmerge

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

PROTECTED: list[list[int]] = [[], [0], [3], [0, 1], [0, 4, 11], [1, 2, 5, 9], [0, 2, 6, 9, 12]]


@pytest.fixture(params=["one program", "three kernels"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to match, whatever the length."""
    if request.param == "three kernels":
        monkeypatch.setattr(gpu_match, "_ONE_PROGRAM", 0)
    return str(request.param)


# ---- match ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "protected"), in_turn([13, 14], PROTECTED))
def test_maps_equal_the_composite_s(tokens: int, protected: list[int], path: str) -> None:
    keys = heads(2, tokens, tokens)
    for r in counts(tokens, protected):
        check_map(keys, r, protected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_of_several_blocks(dtype: torch.dtype, path: str) -> None:
    check_map(heads(1, 201, dtype=dtype), 37, [0, 100, 101])


def test_the_shortest_sequence_that_merges() -> None:
    for tokens in (2, 3, 4):
        check_map(heads(1, tokens), 1, [])


@pytest.mark.parametrize("r", [1, 7, 15])
def test_ties_go_to_the_lower_position(r: int, path: str) -> None:
    check_map(even_cosines(3, 41, r), r, [0])


def test_zeros_of_either_sign_are_equal() -> None:
    from tomepass.kernels.gpu.triton_match import map_kernel

    # As bits, -0.0 is the lowest number of all. Even tokens draw to the first odd one.
    best = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 0.0, -2.0]])
    partner, assign = torch.ones(1, 6, dtype=torch.int32), torch.empty(1, 12, dtype=torch.int64)
    map_kernel[(1,)](best, partner, assign, 12, 2, 4, HELD=(), BLOCK=16)
    # The first two of the four that are zero merge.
    assert assign[0, ::2].tolist() == [0, 4, 4, 1, 2, 3]


def test_a_token_without_a_direction_merges_last(path: str) -> None:
    keys = heads(2, 22)
    keys[:, :, 4] = float("nan")
    keys[:, :, 5] = float("inf")
    keys[:, :, 8] = 0.0
    for r in (1, 5, 10):
        check_map(keys, r, [0])


def test_padding_merges_with_padding(path: str) -> None:
    keys, torch_seed = heads(3, 21), torch.manual_seed(0)
    size = torch.where(torch.rand(3, 21, generator=torch_seed) < 0.4, NEXT_TO_NOTHING, 1.0)
    for r in (1, 5, 9):
        check_map(keys, r, [0], size)


def test_keys_of_any_strides(path: str) -> None:
    check_strided_keys()


def test_an_image_alone_matches_as_among_others(path: str) -> None:
    keys = heads(3, 30)
    assert torch.equal(match_triton(keys[1:2], 9, [0]), match_triton(keys, 9, [0])[1:2])


def test_more_than_can_merge_raises_as_the_composite_does() -> None:
    for operator in (match_triton, match):
        with pytest.raises(ValueError, match="2 of 5 tokens can merge, 1 protected: got r=3"):
            operator(heads(1, 5), 3, [0])


# ---- merge and back ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"), in_turn([(2, 17, 11, 20), (1, 40, 40, 7), (2, 5, 1, 33)], DTYPES)
)
def test_merged_tokens_equal_the_reference(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    check_merge(*shape, dtype)


@pytest.mark.parametrize("protected", PROTECTED, ids=str)
def test_tokens_merge_by_the_maps_of_matches(protected: list[int]) -> None:
    tokens = 13 + len(protected) % 2
    keys, x = heads(2, tokens, tokens), torch.randn(2, tokens, 9)
    for r in counts(tokens, protected):
        assign = match(keys, r, protected)
        merged, size = merged_of(x, None, assign, tokens - r)
        torch.testing.assert_close(merged, merge(x, None, assign, tokens - r))
        assert size.sum(-1).tolist() == [tokens] * 2
        assert torch.equal(unmerge_triton(merged, assign), unmerge(merged, assign, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_sums_and_gathers_of_any_strides(dtype: torch.dtype) -> None:
    check_sums(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_by_itself_and_equal_tokens_stay_bit_by_bit(dtype: torch.dtype) -> None:
    x = torch.randn(1, 3, 9).to(dtype)
    x[:, 2] = x[:, 1]
    x[:, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    merged, size = merged_of(x, torch.tensor([[3.0, 2.0, 2.0]]), torch.tensor([[0, 1, 1]]), 2)
    assert torch.equal(merged.view(torch.uint8), x[:, :2].contiguous().view(torch.uint8))
    assert size.tolist() == [[3.0, 4.0]]


def test_where_nothing_of_any_size_goes_there_is_nothing() -> None:
    x, assign = torch.randn(1, 6, 9), torch.tensor([[0, 1, 1, 3, 4, 4]])
    size = torch.tensor([[2.0, 0.0, 3.0, 0.0, 0.0, 0.0]])
    merged, after = merged_of(x, size, assign, 5)
    assert after.tolist() == [[2.0, 3.0, 0.0, 0.0, 0.0]]
    assert merged[0, 2:].tolist() == [[0.0] * 9] * 3
    torch.testing.assert_close(merged, merge(x, size, assign, 5))


def test_tokens_of_any_strides_and_a_sum_before_them() -> None:
    check_strided_tokens()


def test_a_sum_before_merging_is_rounded_as_by_itself() -> None:
    # The interpreter cuts bfloat16 off where a device rounds.
    x, added = torch.randn(2, 12, 10).half(), 100 * torch.randn(2, 12, 10).half()
    assign = torch.arange(12).expand(2, -1)
    sources = sources_triton(assign, 12)
    merged, _ = merge_triton(x, added, None, assign, *sources)
    assert torch.equal(merged, x + added)
    merged, _ = merge_triton(x, added.float(), None, assign, *sources)
    assert torch.equal(merged, x + added.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_norm_in_the_same_pass(dtype: torch.dtype) -> None:
    check_norm(20, dtype)


# ---- gradients -----------------------------------------------------------------------------


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.deep
def test_gradients_of_float64_are_exact_to_the_second_order() -> None:
    assign, size = assignments(1, 5, 3, 0), torch.tensor([[1.0, 2.0, 4.0, 1.0, 8.0]])
    sources = sources_triton(assign, 3)
    functions: dict[Callable[..., Any], tuple[Tensor, ...]] = {
        lambda x, y: merge_triton(x, y, size, assign, *sources)[0]: (
            double(1, 5, 2),
            double(1, 5, 2),
        ),
        lambda x: sum_triton(x, size, assign, *sources): (double(1, 5, 2),),
        lambda x: unmerge_triton(x, assign): (double(1, 3, 2),),
    }
    for function, inputs in functions.items():
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_gradients_pass_the_layer_norm() -> None:
    assign, size = assignments(1, 5, 3, 0), torch.tensor([[1.0, 2.0, 4.0, 1.0, 8.0]])
    sources = sources_triton(assign, 3)

    def both(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        made = merge_norm_triton(x, y, size, assign, *sources, weight, bias, 1e-5)
        return made[0], made[2]

    inputs = (double(1, 5, 3), double(1, 5, 3), double(3), double(3))
    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_composite_in_float64(dtype: torch.dtype) -> None:
    check_gradients(dtype)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_gradients_of_a_layer_norm_of_other_weights(weights: torch.dtype) -> None:
    check_norm_gradients(torch.float32, weights)


# ---- registration --------------------------------------------------------------------------


def test_operators_are_registered_as_torch_expects() -> None:
    check_registrations()


def test_what_is_compiled_computes_the_same() -> None:
    def work(keys: Tensor, x: Tensor) -> Tensor:
        assign = match_triton(keys, 3, [0])
        merged, _ = merge_triton(x, None, None, assign, *sources_triton(assign, 7))
        return unmerge_triton(merged, assign).square().sum()

    keys, x = heads(2, 10), torch.randn(2, 10, 8, requires_grad=True)
    expected = torch.autograd.grad(work(keys, x), x)
    compiled = torch.compile(work, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(keys, x), x), expected)


def test_without_a_gpu_and_an_interpreter_it_is_said_what_to_do() -> None:
    code = (
        "import torch; from tomepass.kernels.gpu.match import match_triton\n"
        "try: match_triton(torch.randn(1, 1, 8, 16), 2, [0])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.startswith("TomeError Triton's kernels run on CUDA devices")
    assert "TRITON_INTERPRET=1" in run.stdout


def merged_of(x: Tensor, size: Tensor | None, assign: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    merged, total = merge_triton(x, None, size, assign, *sources_triton(assign, tokens))
    assert torch.equal(total, merge_size(size, assign, tokens))
    return merged, total
