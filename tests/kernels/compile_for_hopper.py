"""Compiles the launches of all kernels for Hopper, with no GPU: run by ``test_compiled.py``.

Kernels go through Triton's own launcher, up to machine code, on tensors that are never read. Prints
a line a kernel: name, shared bytes, whether it uses Hopper's matrix unit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tomepass.kernels import gpu_match, gpu_merge
from tomepass.kernels.tuning import Configuration, Run


class Hopper:
    """What Triton asks the driver of a device."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def launch(self: Any, grid: Any) -> Any:
    def compile_only(*args: Any, **kwargs: Any) -> None:
        made = self.run(*args, grid=grid, warmup=True, **kwargs)
        matrix = "wgmma" in made.asm["ptx"]
        print(self.fn.__name__, made.metadata.shared, "wgmma" if matrix else "-")

    return compile_only


def run_first(kind: Any, configurations: list[Configuration], run: Run, device: Any) -> None:
    run(configurations[0])


def main() -> None:
    triton.runtime.driver.set_active(Hopper())
    JITFunction.__getitem__ = launch
    for module in (gpu_match, gpu_merge):
        module.run_fastest = run_first  # type: ignore[attr-defined]
        module.need_triton = lambda x: None  # type: ignore[attr-defined]
    x = torch.zeros(2, 577, 768, dtype=torch.bfloat16)
    keys = x.view(2, 577, 12, 64).transpose(1, 2)
    gpu_match.match_triton(keys, 23, [0], torch.ones(2, 577))
    gpu_match.match_triton(keys[:, :, :65], 16, [0, 5])
    assign = torch.zeros(2, 577, dtype=torch.int64)
    sources = gpu_merge.sources_triton(assign, 554)
    affine = (x[0, 0], x[0, 0])
    gpu_merge.merge_norm_triton(x, x, torch.ones(2, 577), assign, *sources, *affine, 1e-6)
    gpu_merge.sum_triton(x, torch.ones(2, 577), assign, *sources)
    gpu_merge.unmerge_triton(x, assign)


if __name__ == "__main__":
    main()
