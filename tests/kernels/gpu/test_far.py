"""Kernels reach numbers that lie more than 2^31 apart: memory that is asked for, hardly touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.operands import assignments, heads
from tomepass.kernels.cpu import match_cpu, merge_cpu, pad_keys_cpu
from tomepass.kernels.gpu import match as gpu_match
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge
from tomepass.ops.merging.unmerge import unmerge

FAR = 2**31


def apart(x: Tensor, dim: int) -> Tensor:
    """The same numbers, the last along a dimension 2^31 numbers behind the first."""
    strides = list(x.contiguous().stride())
    strides[dim] = -(-FAR // (x.shape[dim] - 1))
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)) + 1
    try:
        memory = torch.empty(reach, dtype=x.dtype)
    except RuntimeError:
        pytest.skip(f"{reach * x.element_size() >> 30} GiB of addresses are not given")
    return memory.as_strided(x.shape, strides).copy_(x)


KEYS = heads(3, 13, dtype=torch.bfloat16)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_match_on_the_cpu(dim: int) -> None:
    assert torch.equal(match_cpu(apart(KEYS, dim), 4, [0]), match(KEYS, 4, [0]))


@pytest.mark.parametrize("dim", [0, 1])
def test_a_merge_on_the_cpu(dim: int) -> None:
    x, assign = torch.randn(3, 12, 10).bfloat16(), assignments(3, 12, 8, 0)
    merged, _ = merge_cpu(apart(x, dim), None, assign, 8)
    assert torch.equal(merged, merge_cpu(x, None, assign, 8)[0])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_padded_keys_on_the_cpu(dim: int) -> None:
    size = torch.ones(3, 13)
    keys, values, _ = pad_keys_cpu(apart(KEYS, dim), KEYS, size, 3)
    assert torch.equal(keys[:, :, :13], KEYS)
    keys, values, _ = pad_keys_cpu(KEYS, apart(KEYS, dim), size, 3)
    assert torch.equal(values[:, :, :13], KEYS)


interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled, not interpreted"
)


@interpreted
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize("path", ["one program", "three kernels"])
def test_a_match_in_triton(dim: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if path == "three kernels":
        monkeypatch.setattr(gpu_match, "_ONE_PROGRAM", 0)
    found = gpu_match.match_triton(apart(KEYS, dim), 4, [0])
    assert torch.equal(found, match(KEYS, 4, [0]))


@interpreted
@pytest.mark.parametrize("dim", [0, 1])
def test_a_merge_and_its_way_back_in_triton(dim: int) -> None:
    pytest.importorskip("triton")
    from tomepass.kernels.gpu.merge import merge_triton, unmerge_triton
    from tomepass.kernels.gpu.sources import sources_triton

    x, added = (torch.randn(3, 12, 16).half() for _ in range(2))
    assign = assignments(3, 12, 8, 0)
    order, start = sources_triton(assign, 8)
    expected, _ = merge_triton(x, added, None, assign, order, start)
    torch.testing.assert_close(expected, merge(x + added, None, assign, 8), rtol=2e-3, atol=2e-3)
    for first, second in ((apart(x, dim), added), (x, apart(added, dim))):
        merged, _ = merge_triton(first, second, None, assign, order, start)
        assert torch.equal(merged, expected)
    back = unmerge_triton(apart(expected, dim), assign)
    assert torch.equal(back, unmerge(expected, assign, 1))
