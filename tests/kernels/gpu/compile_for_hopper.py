"""Compiles the launches of all kernels for Hopper, with no GPU: run by ``test_compiled.py``.

    compile_for_hopper.py [more | orders | fits CAPABILITY]

Kernels go through Triton's own launcher, up to machine code, on tensors that are never read. Prints
a line a kernel: name, shared bytes, whether it uses Hopper's matrix unit; with ``more`` of further
shapes, dtypes and options. With ``orders`` all configurations are compiled, and a line names the
kernel and how threads share out what each of its sums of floats goes through, for each
configuration. With ``fits`` the last configuration of each match is, and a line names the kernel,
shared bytes and what they were reckoned to be.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tomepass.kernels.gpu import match as gpu_match
from tomepass.kernels.gpu import merge as gpu_merge
from tomepass.kernels.gpu.tuning import Configuration, Run


class Hopper:
    """What Triton asks the driver of a device."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", int(sys.argv[2]) if "fits" in sys.argv else 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


ORDERS: list[str] = []
RECKONED = ""


def orders(code: str) -> str:
    """Numbers a thread, threads a warp and warps a program along what is summed, of every sum."""
    layouts = dict(re.findall(r"(#\w+) = #ttg\.blocked<\{(.*?), order", code))
    sums = re.findall(
        r'"tt\.reduce"\(.*?\) <\{axis = (\d) : i32\}> \(\{(.*?)\}\) : \(.*?(#\w+)>\)', code, re.S
    )
    found = []
    for axis, body, layout in sums:
        if "addf" in body:
            parts = re.findall(r"\[([\d, ]+)\]", layouts[layout])
            found.append("x".join(part.split(", ")[int(axis)] for part in parts))
    return ",".join(found)


def launch(self: Any, grid: Any) -> Any:
    def compile_only(*args: Any, **kwargs: Any) -> None:
        made = self.run(*args, grid=grid, warmup=True, **kwargs)
        matrix = "wgmma" in made.asm["ptx"]
        if "orders" in sys.argv:
            ORDERS.append(f"{self.fn.__name__} {orders(made.asm['ttgir'])}")
            return
        last = RECKONED if "fits" in sys.argv else "wgmma" if matrix else "-"
        if last:
            print(self.fn.__name__, made.metadata.shared, last)

    return compile_only


def run_first(kind: Any, configurations: list[Configuration], run: Run, device: Any) -> None:
    run(configurations[0])


def run_all(kind: Any, configurations: list[Configuration], run: Run, device: Any) -> None:
    ORDERS.clear()
    for configuration in configurations:
        run(configuration)
    name, *_ = ORDERS[0].split()
    print(name, *(line.removeprefix(name).strip() for line in ORDERS))


def run_last(kind: Any, configurations: list[Configuration], run: Run, device: Any) -> None:
    global RECKONED
    if kind[0] in ("match_image", "edges"):
        RECKONED = str(gpu_match.shared_bytes(configurations[-1], kind[4]))
        run(configurations[-1])
        RECKONED = ""


def main() -> None:
    every = "orders" in sys.argv
    chosen = run_all if every else run_last if "fits" in sys.argv else run_first
    triton.runtime.driver.set_active(Hopper())
    JITFunction.__getitem__ = launch
    for module in (gpu_match, gpu_merge):
        module.run_fastest = chosen  # type: ignore[attr-defined]
        module.need_triton = lambda x: None  # type: ignore[attr-defined]
    for word, work in (("orders", compile_sums), ("more", compile_more), ("fits", compile_widest)):
        if word in sys.argv:
            work()
            return
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


def keys_of(tokens: int, heads: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(2, tokens, heads, width, dtype=dtype).transpose(1, 2)


def compile_more() -> None:
    """Each option and width that :func:`main` leaves out."""
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    gpu_match.match_triton(keys_of(729, 16, 72, brain), 24, [])  # SigLIP: nothing is protected
    gpu_match.match_triton(keys_of(65, 2, 64, half), 16, [0], torch.ones(2, 65))
    gpu_match.match_triton(keys_of(4097, 12, 64, half), 300, [0])
    for width in (72, 128, 256):
        gpu_match.match_triton(keys_of(577, 2, width, half), 23, [0])
    # Wider ones take a minute: their products are written out.
    gpu_match.match_triton(keys_of(577, 2, 72, single), 23, [0])
    for dtype in (half, brain, single):
        x, weight = torch.zeros(2, 577, 1152, dtype=dtype), torch.ones(2, 577)
        assign = torch.zeros(2, 577, dtype=torch.int64)
        sources = gpu_merge._sources_result(assign, 554)
        gpu_merge.merge_triton(x, None, None, assign, *sources)
        gpu_merge.merge_triton(x, x, weight, assign, *sources)
        gpu_merge.unmerge_triton(x, assign, weight)


def compile_widest() -> None:
    """What of a match shares the most: products in three, so of narrow dtypes."""
    for tokens, width in ((256, 64), (128, 128), (32, 256), (577, 64), (577, 128)):
        keys = keys_of(tokens, 2, width, torch.bfloat16)
        gpu_match.match_triton(keys, 9, [0], torch.ones(2, tokens))
    gpu_match.match_triton(keys_of(40, 2, 64, torch.float32), 9, [0])


def compile_sums() -> None:
    """The kernels that sum floats over channels, at shapes that fill few threads and many."""
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, width in ((197, 64), (40, 64), (40, 32), (197, 16), (577, 64), (577, 16)):
            keys = torch.zeros(2, tokens, 2, width, dtype=dtype).transpose(1, 2)
            gpu_match.match_triton(keys, 9, [0])
        assign = torch.zeros(2, 197, dtype=torch.int64)
        sources = gpu_merge._sources_result(assign, 181)
        for width in (64, 768, 1152):
            x = torch.zeros(2, 197, width, dtype=dtype)
            affine = (x[0, 0], x[0, 0])
            gpu_merge.merge_norm_triton(x, x, None, assign, *sources, *affine, 1e-6)


if __name__ == "__main__":
    main()
