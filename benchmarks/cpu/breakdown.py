"""Where the time of a compiled ViT goes, unmerged and merged: operator by operator, block by block.

    python -m benchmarks breakdown --r 16 --batch 16 --dtype bf16

Inductor's kernels are named after the operators in them; a kernel that both weighs keys by
size and does something else (pads them, say) counts as attention. Freezing is on, and the two
forms take turns. The profiler costs both some time: take the speed-up from
``python -m benchmarks throughput``.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.cpu.throughput import SIZES, make_model
from benchmarks.results import OUT, Results, cell, stacks
from tomepass import ToMe, TomeBackend
from tomepass.cli.options import parse_dtype, parse_r

KINDS = ("linear", "attention", "matching", "merging", "glue", "rest")

LINEARS_A_BLOCK = 6  # query, key, value, output, and two of the MLP

FORMS = ("unmerged", "merged")

Times = dict[tuple[int, str], float]
"""Milliseconds of one call by block and kind; block -1 is all that no block holds."""


def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(SIZES)}.")] = "vit_base",
    r: Annotated[str, typer.Option(help="Tokens merged a block.")] = "16",
    multiple_of: Annotated[int, typer.Option(help="Round token counts down to these.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 16,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "bf16",
    calls: Annotated[int, typer.Option(min=1, help="Calls of each form.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="PyTorch's threads.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = OUT,
) -> None:
    """Profile both forms and print milliseconds a call, by kind and by block."""
    if threads is not None:
        torch.set_num_threads(threads)
    width, depth, _ = SIZES[model]
    subject = make_model(model).to(parse_dtype(dtype))
    pixels = torch.randn(batch, 3, 224, 224).to(parse_dtype(dtype))
    method = ToMe(parse_r(r), multiple_of=multiple_of)
    times = profiled(subject, pixels, method, calls, width)
    Results(
        name="breakdown",
        title=f"{model}, {method!r}, batch {batch}, {dtype}: milliseconds a call",
        columns={"": cell("what")}
        | {kind: cell(kind, "{:.2f}") for kind in KINDS}
        | {"in all": lambda row: f"{sum(row[kind] for kind in KINDS):.2f}"},
        rows=list(_rows(times, depth)),
        settings={"model": model, "r": r, "batch": batch, "dtype": dtype, "calls": calls},
        plot=_plot,
    ).publish(out)


def _plot(axes: Any, rows: Any) -> None:
    """The two forms as stacks of kinds."""
    both = rows[: len(FORMS)]
    stacks(axes, FORMS, {kind: [row[kind] for row in both] for kind in KINDS})
    axes.set_ylabel("milliseconds a call")


def profiled(
    model: nn.Module, pixels: torch.Tensor, method: ToMe, calls: int, width: int
) -> dict[str, Times]:
    """Medians over the calls of both forms, which take turns."""
    backends: tuple[Any, ...] = ("inductor", TomeBackend(method))
    with torch.no_grad(), named_kernels():
        torch.compiler.reset()
        runs: list[Any] = [torch.compile(copy.deepcopy(model), backend=b) for b in backends]
        for run in runs * 3:
            run(pixels)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            for _ in range(calls):
                for name, run in zip(FORMS, runs, strict=True):
                    with record_function(name):
                        run(pixels)
    seen: Any = recorded.events()
    events = sorted(seen or (), key=lambda event: event.time_range.start)
    return {name: _medians(list(_calls(events, name, width))) for name in FORMS}


@contextlib.contextmanager
def named_kernels() -> Iterator[None]:
    """Inductor with freezing, whose kernels the profiler sees under their operators' names."""
    import torch._inductor.config as config

    names = {"cpp.enable_kernel_profile": True, "cpp.descriptive_names": "torch"}
    with config.patch({"freezing": True, **names}):
        yield


def _calls(events: list[Any], form: str, width: int) -> Iterator[Times]:
    for call in (event for event in events if event.name == form):
        span = call.time_range
        times: Times = defaultdict(float)
        linears, spent = 0, 0.0
        for event in events:
            inside = span.start <= event.time_range.start < span.end
            kind = _kind(event, width) if inside else None
            if kind is None:
                continue
            block = -1 if kind == "embedding" else linears // LINEARS_A_BLOCK
            linears += kind == "linear"
            milliseconds = event.self_cpu_time_total / 1000
            spent += milliseconds
            times[block, "glue" if kind == "embedding" else kind] += milliseconds
        times[-1, "rest"] += (span.end - span.start) / 1000 - spent
        yield times


def _kind(event: Any, width: int) -> str | None:
    """What an event of the profiler is about; None for one that is about nothing of ours."""
    name = event.name
    if name in ("tome::match_cpu", "tome::merge_cpu"):
        return "matching" if "match" in name else "merging"
    if "cpp_fused" in name:
        if "tome_match" in name:
            return "matching"
        if "tome_log_size" in name:
            return "attention"
        return "merging" if "tome_merge" in name or "tome_compose" in name else "glue"
    if "linear" in name or name in ("aten::addmm", "aten::mm"):
        return "linear"
    if "scaled_dot_product" in name:
        return "attention"
    if name == "aten::bmm":
        return "merging" if event.input_shapes[1][-1] == width else "matching"
    if name == "aten::cumsum":
        return "matching"
    return "embedding" if "convolution" in name else None


def _medians(samples: list[Times]) -> Times:
    places = {place for times in samples for place in times}
    return {place: median(times.get(place, 0.0) for times in samples) for place in places}


def _rows(times: dict[str, Times], depth: int) -> Iterator[dict[str, Any]]:
    """For each form all blocks in one row, then the merged form block by block."""
    for form in FORMS:
        kinds = {kind: sum(v for (_, k), v in times[form].items() if k == kind) for kind in KINDS}
        yield {"what": form, **kinds}
    for block in range(depth):
        kinds = {kind: times["merged"].get((block, kind), 0.0) for kind in KINDS}
        yield {"what": f"block {block}", **kinds}


if __name__ == "__main__":
    typer.run(main)
