"""Where OpenVINO's time goes, unmerged and merged: milliseconds by its own kinds of layers.

    python -m benchmarks openvino-layers --r 16 --batch 16

Both forms are exported and converted, and compute in bfloat16 from float32 weights where the
processor can. Times are OpenVINO's performance counters, the two forms in turns.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import nn

import tomepass
from benchmarks.cpu.throughput import SIZES, make_model
from benchmarks.results import OUT, Results, bars, cell
from tomepass import ToMe
from tomepass.cli.options import parse_r
from tomepass.sources.examples import example_inputs

FORMS = ("unmerged", "merged")

SHOWN = 12


def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(SIZES)}.")] = "vit_base",
    r: Annotated[str, typer.Option(help="Tokens merged a block.")] = "16",
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 16,
    calls: Annotated[int, typer.Option(min=1, help="Calls of each form.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="OpenVINO's threads.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = OUT,
) -> None:
    """Print milliseconds a call of both forms by kind of layer, the costliest first."""
    subject = make_model(model)
    inputs = example_inputs(subject, batch)
    merged = tomepass.apply(subject, ToMe(parse_r(r)), example_inputs=inputs)
    requests = [_request(form, inputs, threads) for form in (subject, merged)]
    values = [value.numpy() for value in inputs.values()]
    samples: list[list[dict[str, float]]] = [[], []]
    for _ in range(calls):
        for request, found in zip(requests, samples, strict=True):
            request.infer(values)
            found.append(_by_kind(request))
    kinds = {kind for found in samples for times in found for kind in times}
    rows: list[dict[str, Any]] = [
        {"layers": kind}
        | {
            form: median(times.get(kind, 0.0) for times in found)
            for form, found in zip(FORMS, samples, strict=True)
        }
        for kind in kinds
    ]
    rows.sort(key=lambda row: -max(row[form] for form in FORMS))
    rest = {form: sum(row[form] for row in rows[SHOWN:]) for form in FORMS}
    rows = [*rows[:SHOWN], {"layers": "rest", **rest}]
    rows.append({"layers": "in all"} | {form: sum(row[form] for row in rows) for form in FORMS})
    Results(
        name="openvino_layers",
        title=f"{model}, r={r}, batch {batch}, OpenVINO: milliseconds a call",
        columns={"layers": cell("layers")} | {form: cell(form, "{:.1f}") for form in FORMS},
        rows=rows,
        settings={"model": model, "r": r, "batch": batch, "threads": threads, "calls": calls},
        plot=_plot,
    ).publish(out)


def _plot(axes: Any, rows: Any) -> None:
    shown = rows[:5]
    labels = [row["layers"] for row in shown]
    bars(axes, labels, {form: [row[form] for row in shown] for form in FORMS})
    axes.set_ylabel("milliseconds a call")


def _request(form: nn.Module, inputs: dict[str, torch.Tensor], threads: int) -> Any:
    import openvino

    with torch.no_grad():
        program = torch.export.export(form, (), inputs)
    hints = {"PERF_COUNT": "YES", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(openvino.convert_model(program), "CPU", hints)
    return compiled.create_infer_request()


def _by_kind(request: Any) -> dict[str, float]:
    times: dict[str, float] = defaultdict(float)
    for layer in request.profiling_info:
        times[layer.node_type] += layer.real_time.total_seconds() * 1000
    return times
