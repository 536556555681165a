"""Equal tokens come out of a merge as they went in: to the bit, in every dtype, on every path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.operands import assignments
from tomepass.kernels.cpu import DTYPES, merge_bias_cpu, merge_cpu
from tomepass.ops.dropping.prune import fuse_rest, gather_size
from tomepass.ops.merging.combine import merge_max, mlerp
from tomepass.ops.merging.merge import merge
from tomepass.ops.merging.side import merge_bias, merge_rows
from tomepass.ops.merging.weighted_mean import weighted_mean

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
IMAGES, TOKENS, LEFT, WIDTH = 3, 23, 7, 33
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def kinds(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """``[B, N', C]`` of all magnitudes, negative zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(IMAGES, LEFT, WIDTH, generator=generator)
    made = made * 10.0 ** torch.randint(-3, 4, made.shape, generator=generator)
    return torch.where(torch.rand(made.shape, generator=generator) < 0.05, -0.0, made).to(dtype)


def index_map(seed: int = 0) -> Tensor:
    return assignments(IMAGES, TOKENS, LEFT, seed)


def sizes(kind: str) -> Tensor | None:
    generator = torch.Generator().manual_seed(1)
    if kind == "none":
        return None
    if kind == "scores":  # as a method weighs what it fuses
        return torch.rand(IMAGES, TOKENS, generator=generator).clamp(min=1e-20)
    drawn = torch.randint(1, 300, (IMAGES, TOKENS), generator=generator).float()
    if kind == "with padding":
        drawn[torch.rand(drawn.shape, generator=generator) < 0.3] = 1e-30
    return drawn


def spread(x: Tensor, assign: Tensor) -> Tensor:
    return x.gather(1, assign.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


Path = Callable[[Tensor, Tensor | None, Tensor], Tensor]
PATHS: dict[str, Path] = {
    "mean": lambda x, size, assign: merge(x, size, assign, LEFT),
    "largest": lambda x, size, assign: merge_max(x, assign, LEFT),
    "greatest norm": lambda x, size, assign: mlerp(x, size, assign, LEFT, "max"),
    "mean norm": lambda x, size, assign: mlerp(x, size, assign, LEFT, "mean"),
    "rows beside": lambda x, size, assign: merge_rows(x, assign, LEFT),
    "kernel": lambda x, size, assign: merge_cpu(x, size, assign, LEFT)[0],
}


@every_dtype
@pytest.mark.parametrize("path", PATHS)
def test_equal_tokens_merge_to_themselves(path: str, dtype: torch.dtype) -> None:
    if path == "kernel" and dtype not in DTYPES:
        pytest.skip("there is no such kernel")
    for seed in range(3):
        wanted, assign = kinds(dtype, seed), index_map(seed)
        for how in ("none", "drawn", "with padding", "scores"):
            got = PATHS[path](spread(wanted, assign), sizes(how), assign)
            assert torch.equal(bits(got), bits(wanted)), how


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_equal_tokens_merge_to_themselves_on_triton(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from tomepass.kernels.gpu.merge import merge_triton
    from tomepass.kernels.gpu.sources import sources_triton

    wanted, assign = kinds(dtype), index_map()
    order, start = sources_triton(assign, LEFT)
    x = spread(wanted, assign)
    for how in ("none", "drawn", "with padding", "scores"):
        got, _ = merge_triton(x, None, sizes(how), assign, order, start)
        assert torch.equal(bits(got), bits(wanted)), how
    got, _ = merge_triton(x, torch.zeros_like(x), None, assign, order, start)
    assert torch.equal(got, wanted)


@every_dtype
def test_what_is_fused_of_equal_tokens_is_one_of_them(dtype: torch.dtype) -> None:
    """EViT's fused token, SPViT's package: a mean weighted by scores of what is not kept."""
    torch.manual_seed(0)
    score, stands = torch.rand(IMAGES, TOKENS), torch.arange(4).expand(IMAGES, -1)
    assign, places = fuse_rest(score, stands)
    x = torch.randn(IMAGES, TOKENS, WIDTH).to(dtype)
    x[:, 4:] = x[:, 4:5]
    merged = merge(x, score, assign, 5)
    assert torch.equal(bits(merged), bits(x[:, :5]))
    assert gather_size(None, places).shape == (IMAGES, 5)


@every_dtype
@pytest.mark.parametrize("keepdim", [True, False])
def test_the_mean_of_equal_tokens_is_one_of_them(dtype: torch.dtype, keepdim: bool) -> None:
    one = kinds(dtype)[:, :1]
    for how in ("drawn", "with padding", "scores"):
        size = sizes(how)
        assert size is not None
        x = torch.where((size < 1e-6).unsqueeze(-1), -one, one.expand(-1, TOKENS, -1))
        got = weighted_mean(x, size, 1, keepdim)
        nonzero = one != 0  # what is left out may turn the sign of a zero
        assert torch.equal(got.reshape(one.shape)[nonzero], one[nonzero])
        assert torch.equal(weighted_mean(x.mT, size, 2, False), got.reshape(IMAGES, WIDTH))


BIASES: dict[str, Path] = {
    "composite": lambda bias, _, source: merge_bias(bias, source, LEFT),
    "kernel": lambda bias, _, source: merge_bias_cpu(bias, source, LEFT),
}


@every_dtype
@pytest.mark.parametrize("path", BIASES)
def test_equal_biases_merge_to_themselves(path: str, dtype: torch.dtype) -> None:
    if path == "kernel" and dtype not in DTYPES:
        pytest.skip("there is no such kernel")
    source = index_map()[:1].expand(IMAGES, -1)
    generator = torch.Generator().manual_seed(2)
    for scale in (0.1, 5.0, 60.0):
        wanted = (scale * torch.randn(1, 2, LEFT, LEFT, generator=generator)).to(dtype)
        bias = wanted[:, :, source[0]][..., source[0]]
        got = BIASES[path](bias, None, source)
        assert torch.equal(got, wanted.expand(IMAGES, -1, -1, -1)), scale
    constant = torch.full((1, 2, TOKENS, TOKENS), -0.3, dtype=dtype)
    got = BIASES[path](constant, None, index_map())
    assert torch.equal(got, constant[..., :LEFT, :LEFT].expand(IMAGES, -1, -1, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_in_a_narrow_dtype_is_rounded_once(dtype: torch.dtype) -> None:
    """Nothing is multiplied in it: a mean lies between its tokens, next to the exact one."""
    torch.manual_seed(0)
    x, assign, size = torch.randn(IMAGES, TOKENS, WIDTH).to(dtype), index_map(), sizes("drawn")
    exact, got = merge(x.double(), size, assign, LEFT), merge(x, size, assign, LEFT)
    ulp = torch.finfo(dtype).eps * exact.abs()
    assert bool(((got.double() - exact).abs() <= 0.51 * ulp + 1e-6).all())


@pytest.mark.parametrize("operator", [merge, mlerp, weighted_mean, merge_rows, merge_bias])
def test_gradients_of_equal_tokens_are_shared_by_weight(operator: object) -> None:
    """What is counted from one of the tokens is no detour for gradients."""
    x = torch.ones(1, 3, 2, dtype=torch.float64).cumsum(-1).requires_grad_()
    size, assign = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[1, 1, 0]])
    wanted = torch.tensor([[0.25, 0.75, 1.0]], dtype=torch.float64)
    if operator is merge:
        merge(x, size, assign, 2).sum().backward()
    elif operator is mlerp:
        mlerp(x, size, assign, 2, "mean").sum().backward()
    elif operator is weighted_mean:
        weighted_mean(x, size, 1, False).sum().backward()
        wanted = size.double() / 6
    elif operator is merge_rows:
        merge_rows(x, assign, 2).sum().backward()
        wanted = torch.tensor([[0.5, 0.5, 1.0]], dtype=torch.float64)
    else:
        bias = torch.zeros(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
        merge_bias(bias, assign, 2).sum().backward()
        share = torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64)
        torch.testing.assert_close(bias.grad, (share[:, None] * share).expand(1, 1, 3, 3))
        return
    torch.testing.assert_close(x.grad, wanted.unsqueeze(-1).expand(-1, -1, 2))
