"""What the interpreted kernels' other tests do not see: ties far apart, sums that are merged."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.checks import check_map
from benchmarks.gpu.operands import heads
from tomepass.kernels.gpu import match as gpu_match
from tomepass.kernels.gpu.merge import merge_triton
from tomepass.kernels.gpu.sources import sources_triton

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled, not interpreted"
)


@pytest.mark.parametrize("path", ["one program", "three kernels"])
def test_partners_in_several_blocks_tie(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "three kernels":
        monkeypatch.setattr(gpu_match, "_ONE_PROGRAM", 0)
    keys = heads(1, 201, count=1, width=16)
    keys[:, :, 1::2] = keys[:, :, 1:2]  # every odd token is as near as the first
    check_map(keys, 20, [0])


def test_a_sum_is_rounded_before_it_is_merged() -> None:
    x, added = torch.randn(2, 12, 10).half(), 100 * torch.randn(2, 12, 10).half()
    assign = torch.arange(12).expand(2, -1) // 2
    merged, _ = merge_triton(x, added, None, assign, *sources_triton(assign, 6))
    first, second = (x + added).float().unflatten(1, (6, 2)).unbind(2)
    assert torch.equal(merged, (first + (second - first) / 2).half())
