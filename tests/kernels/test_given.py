"""Kernels are given addresses: whatever comes, they raise in words or answer as the composites."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tests.kernels.wrong_arguments import (
    LEFT,
    ON_CPU,
    REFUSED,
    Kernel,
    answer,
    calls,
    fault,
    index_map,
    keys,
    sizes,
    tokens,
)
from tomepass.kernels import cpu
from tomepass.kernels.cpu import match_cpu, merge_cpu, pad_keys_cpu
from tomepass.kernels.gpu.match import match_triton
from tomepass.kernels.gpu.merge import merge_norm_triton, merge_triton, sum_triton, unmerge_triton
from tomepass.kernels.gpu.sources import sources_triton
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge, merge_size
from tomepass.ops.merging.unmerge import unmerge

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
ORDER, START = sources_triton(index_map(), LEFT)


def sources(assign: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """What is no index goes before all places, or after them."""
    known = assign.clamp(-1, left)
    start = [(known < place).sum(-1) for place in range(left + 1)]
    return known.argsort(dim=1, stable=True).int(), torch.stack(start, -1).int()


def merged(
    x: Tensor, added: Tensor | None, size: Tensor | None, assign: Tensor, *_: Tensor
) -> tuple[Tensor, ...]:
    x = x if added is None else x + added
    return merge(x, size, assign, LEFT), merge_size(size, assign, LEFT)


def normed(x: Tensor, added: Tensor | None, size: Tensor, assign: Tensor, *rest: Any) -> Any:
    made, total = merged(x, added, size, assign)
    _, _, weight, bias, eps = rest
    dtype = torch.promote_types(made.dtype, weight.dtype)
    affine = weight.to(dtype), bias.to(dtype)
    return (
        made,
        total,
        torch.nn.functional.layer_norm(made.to(dtype), (made.shape[2],), *affine, eps),
    )


def summed(x: Tensor, weight: Tensor | None, assign: Tensor, *_: Tensor) -> Tensor:
    goes = (assign.unsqueeze(1) == torch.arange(LEFT)[:, None]).double()
    goes = goes if weight is None else goes * weight.double().unsqueeze(1)
    return (goes @ x.double()).to(x.dtype)


def unmerged(x: Tensor, source: Tensor, weight: Tensor | None = None) -> Tensor:
    inside = (source >= 0) & (source < x.shape[1])
    x = x if x.shape[1] else x.new_zeros(x.shape[0], 1, x.shape[2])
    found = unmerge(x, torch.where(inside, source, 0), 1)
    found = torch.where(inside.unsqueeze(-1), found, float("nan"))
    return found if weight is None else (found * weight.unsqueeze(-1)).to(x.dtype)


_ONE = torch.linspace(-1, 1, 5)
_OWN = (tokens(), tokens(1), sizes(), index_map(), ORDER, START)
ON_CUDA = {
    "match": Kernel(match_triton, match, (keys()[..., :4], 3, [0], sizes())),
    "sources": Kernel(sources_triton, sources, (index_map(), LEFT)),
    "merge": Kernel(merge_triton, merged, _OWN, loose=(3, 4, 5)),
    "norm": Kernel(merge_norm_triton, normed, (*_OWN, _ONE, _ONE, 1e-5), loose=(3, 4, 5)),
    "sum": Kernel(sum_triton, summed, (*_OWN[:1], *_OWN[2:]), loose=(2, 3, 4)),
    "unmerge": Kernel(unmerge_triton, unmerged, (tokens()[:, :LEFT], index_map(), sizes())),
}


def faults(kernel: Kernel) -> list[str]:
    found = ((name, fault(kernel, place, given)) for name, place, given in calls(kernel))
    return [f"{name} {wrong}" for name, wrong in found if wrong]


@pytest.mark.parametrize("name", ON_CPU)
def test_a_cpu_kernel_answers_as_its_composite_or_raises(name: str) -> None:
    assert not fault(ON_CPU[name], -1, ON_CPU[name].arguments)
    assert faults(ON_CPU[name]) == []


@pytest.mark.deep
@pytest.mark.parametrize("name", ON_CUDA)
def test_a_cuda_kernel_answers_as_its_composite_or_raises(name: str) -> None:
    assert not fault(ON_CUDA[name], -1, ON_CUDA[name].arguments)
    assert faults(ON_CUDA[name]) == []


@pytest.mark.parametrize("name", ON_CUDA)
def test_a_cuda_kernel_refuses_what_its_result_is_not_known_of(name: str) -> None:
    """Lengths, dtypes and devices are checked before a launch, as on fake tensors."""
    kernel, refused = ON_CUDA[name], 0
    for wrong, _, arguments in calls(kernel):
        mixed = len({a.device for a in arguments if isinstance(a, Tensor)}) > 1
        meta = tree_map_only(Tensor, lambda a: a.to("meta"), arguments)
        if mixed or isinstance(answer(kernel.operator, meta), Exception):
            refused += 1
            error = answer(kernel.operator, arguments)
            assert isinstance(error, (*REFUSED, NotImplementedError)), wrong
    assert refused > 12


# ---- what was found -------------------------------------------------------------------------


def test_sizes_of_one_image_are_those_of_all() -> None:
    """A padding mask that all images share once had memory read behind it."""
    size = sizes()[:1]
    every = size.expand(3, -1).contiguous()
    assert torch.equal(match_cpu(keys(), 3, [0], size), match(keys(), 3, [0], every))
    assert torch.equal(match_triton(keys(), 3, [0], size), match(keys(), 3, [0], every))
    one, all_ = (merge_cpu(tokens(), given, index_map(), LEFT) for given in (size, every))
    assert all(torch.equal(a, b) for a, b in zip(one, all_, strict=True))
    one, all_ = (
        merge_triton(tokens(), None, given, index_map(), ORDER, START) for given in (size, every)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, all_, strict=True))


def test_values_may_be_wider_than_keys() -> None:
    values = torch.cat([keys(1), keys(2)], -1)
    _, padded, _ = pad_keys_cpu(keys(), values, sizes(), 7)
    assert torch.equal(padded, torch.nn.functional.pad(values, (0, 0, 0, 7)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_sizes_of_any_dtype_are_read_as_float32(dtype: torch.dtype) -> None:
    size = torch.arange(1.0, 28).view(3, 9)
    got = merge_cpu(tokens(), size.to(dtype), index_map(), LEFT)
    expected = merge_cpu(tokens(), size, index_map(), LEFT)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    merged = merge(tokens(), size.to(dtype), index_map(), LEFT)
    assert torch.equal(merged, merge(tokens(), size, index_map(), LEFT))
    assert merge_size(size.to(dtype), index_map(), LEFT).dtype is torch.float32


def test_maps_of_another_dtype_are_refused() -> None:
    assign = index_map().int()
    for operator in (merge_cpu, merge):
        with pytest.raises(ValueError, match=r"expected assign of torch.int64, got torch.int32"):
            operator(tokens(), None, assign, LEFT)


def test_what_is_no_index_is_nowhere_to_be_found() -> None:
    source = torch.tensor([[0, -1, 5, 6, 2**40]]).expand(3, -1)
    got = unmerge_triton(tokens()[:, :LEFT], source)
    assert torch.equal(got[:, [0, 2]], tokens()[:, [0, 5]])
    assert got[:, [1, 3, 4]].isnan().all()


def test_sources_that_contradict_the_map_read_no_other_memory() -> None:
    order, start = torch.full_like(ORDER, 10**6), torch.full_like(START, -(10**6))
    start[:, 1::2] = 10**6
    merged, total = merge_triton(tokens(), None, sizes(), index_map(), order, start)
    assert merged.shape == (3, LEFT, 5)
    assert total.max() <= 9 * sizes().max()


def test_protected_positions_are_of_the_sequence() -> None:
    for operator in (match_cpu, match_triton, match):
        with pytest.raises(ValueError, match=r"9 tokens have no protected positions \[9\]"):
            operator(keys(), 2, [9])


# ---- memory ---------------------------------------------------------------------------------


@pytest.mark.deep
@pytest.mark.parametrize("planted", [False, True])
def test_an_address_sanitizer_finds_nothing_but_what_is_planted(
    planted: bool, tmp_path: Path
) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    # The second or errors cannot be thrown.
    runtime = [_library_of(compiler, name) for name in ("libasan.so", "libstdc++.so")]
    if not all(map(os.path.isabs, runtime)):
        pytest.skip("g++ has no libasan.so")
    source, library = tmp_path / "cpu.cpp", tmp_path / "cpu.so"
    code = Path(cpu.__file__).with_suffix(".cpp").read_text()
    if planted:
        right, wrong = "size_out[b * left + j] = total;", "size_out[batch * left] = total;"
        assert code.count(right) == 1
        code = code.replace(right, wrong)
    source.write_text(code)
    options = ["-O1", "-g", "-fsanitize=address", "-fopenmp", "-shared", "-fPIC", "-std=c++17"]
    subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
        "SANITIZED": str(library),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
    }
    command = [sys.executable, str(ROOT / "tests/kernels/wrong_arguments.py")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ("heap-buffer-overflow" in run.stderr) == planted, run.stderr[-3000:]
    assert (run.returncode == 0) == ("all calls made" in run.stdout) == (not planted)


def _library_of(compiler: str, name: str) -> str:
    asked = [compiler, f"-print-file-name={name}"]
    found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return os.path.realpath(found) if os.path.isabs(found) else found
