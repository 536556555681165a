"""Where a compiled model's time goes on a GPU, kernel by kernel, unmerged and merged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import tomepass
from benchmarks.gpu.models import Setting
from benchmarks.gpu.options import options_of, verdict
from tomepass import ToMe, TomeBackend

KINDS = ("linear", "attention", "matching", "merging", "rest")

_MOST = 0.05
"""Share of merged time that matching and merging may take."""


# What names say, the first that fits: Inductor names a fused kernel after all operators in it.
_WORDS = {
    "matching": ("match_image", "metric_kernel", "edges_kernel", "map_kernel", "tome_match"),
    "merging": ("merge_kernel", "sources_kernel", "gather_kernel", "tome_merge", "tome_compose"),
    "attention": ("flash", "fmha", "attention", "sdpa", "flex", "log_size"),
    "linear": ("gemm", "cutlass", "nvjet", "triton_tem", "_mm", "addmm", "cublas", "linear"),
}


def profiled(
    setting: Setting, mode: str, dtype: torch.dtype, rounds: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """A row a form: milliseconds a call by kind of kernel, and the share of matching and merging.

    The merged form is measured with the composite operators too: what the kernels changed. Their
    products count as linear layers, whose kernels have the same names; and the merge kernel's time
    holds the residual sum and the LayerNorm that it takes along, so the share is an upper bound.
    """
    images, r = setting.images(device, dtype), setting.counts[-1]
    for form in ("unmerged", "merged, composite operators", "merged"):
        torch.compiler.reset()
        model: Any = setting.model().to(device, dtype)
        if form != "unmerged":
            model = tomepass.apply(model, ToMe(r), example_inputs=images)
        options = options_of(mode) if device.type == "cuda" else {}
        options |= {"triton.descriptive_names": "torch"}  # which say tome_match, tome_merge
        backend: Any = TomeBackend(None, inner_options=options)
        if "composite" in form:  # an inner backend by another name gets no kernels
            model = _composite(model, images)
            backend = _plain_inductor(options)
        compiled: Any = torch.compile(model, backend=backend)
        times = _times(lambda run=compiled: run(images), rounds, device)
        whole = sum(times.values())
        share = (times["matching"] + times["merging"]) / max(whole, 1e-9)
        row = {"what": form, **times, "in all": whole, "matching and merging": share}
        judged = form == "merged"
        goal = {"to reach": _MOST if judged else "-"}
        yield row | goal | {"reached": verdict(share <= _MOST) if judged else "-"}


def _composite(merged: Any, images: torch.Tensor) -> Any:
    """An applied model whose captures run composite operators."""
    from dataclasses import replace

    merged._tome.captures.change(lambda applied: replace(applied, on_device=None))
    return merged


def _plain_inductor(options: dict[str, Any]) -> Any:
    from torch._inductor.compile_fx import compile_fx

    def backend(gm: Any, inputs: Any) -> Any:
        return compile_fx(gm, inputs, config_patches=options or None)

    return backend


def _times(run: Any, rounds: int, device: torch.device) -> dict[str, float]:
    with torch.no_grad():
        for _ in range(4):
            run()
        cuda = device.type == "cuda"
        activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
        with profile(activities=activities) as recording:
            for _ in range(rounds):
                run()
            if cuda:
                torch.cuda.synchronize(device)
    times: dict[str, float] = defaultdict(float)
    for event in recording.key_averages():
        spent: Any = event
        own = spent.self_device_time_total if cuda else spent.self_cpu_time_total
        times[kind_of(spent.key)] += own / 1000 / rounds
    return {kind: times[kind] for kind in KINDS}


def kind_of(name: str) -> str:
    """What a kernel is about, by its name: the pass's own first, as Inductor fuses and names."""
    low = name.lower()
    return next((kind for kind, words in _WORDS.items() if any(w in low for w in words)), "rest")
