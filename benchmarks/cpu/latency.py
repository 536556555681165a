"""One image at a time, and how much memory a call needs: small batches, merged and unmerged.

    python -m benchmarks latency --batch 1 2 4 --r 16

Few tokens a call leave the reading of weights, which merging does not shorten: here it gains least.
Tensor memory is what a call holds beyond weights and inputs, convolution scratch included.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.cpu.throughput import SIZES, make_model
from benchmarks.results import COMPARED, OUT, Results, bars, cell, compared
from tomepass import ToMe
from tomepass.cli.options import parse_dtype, parse_r
from tomepass.measuring.measure import measure
from tomepass.sources.examples import example_inputs


def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(SIZES)}.")] = "vit_base",
    batch: Annotated[list[int] | None, typer.Option(help="Images a call. Default 1 2 4.")] = None,
    r: Annotated[list[str] | None, typer.Option(help="Tokens merged a block. Default 16.")] = None,
    multiple_of: Annotated[
        list[int] | None, typer.Option(help="Round token counts down to these. Default 1 16.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    freezing: Annotated[bool, typer.Option(help="Weights as constants.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="PyTorch's threads.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = OUT,
) -> None:
    """Print milliseconds an image and peak memory, merged against unmerged."""
    if threads is not None:
        torch.set_num_threads(threads)
    subject = make_model(model).to(parse_dtype(dtype))
    rows = []
    for images in batch or (1, 2, 4):
        inputs = example_inputs(subject, images)
        for text, multiple in itertools.product(r or ("16",), multiple_of or (1, 16)):
            method = ToMe(parse_r(text), multiple_of=multiple)
            options = {"freezing": True} if freezing else {}
            found = measure(subject, inputs, method, inner_options=options, rounds=rounds)
            row = {"batch": images, "r": text, "multiple_of": multiple}
            rows.append(row | compared(found))
    Results(
        name="latency",
        title=f"{model}, {dtype}, inductor{' with freezing' * freezing}",
        columns={name: cell(name) for name in ("batch", "r", "multiple_of")} | COMPARED,
        rows=rows,
        settings={"model": model, "dtype": dtype, "freezing": freezing, "rounds": rounds},
        plot=_plot,
    ).publish(out)


def _plot(axes: Any, rows: Any) -> None:
    labels = [f"batch {row['batch']}\nr={row['r']}\n{_rounded(row['multiple_of'])}" for row in rows]
    series = {"unmerged": "ms unmerged", "merged": "ms merged"}
    bars(axes, labels, {name: [row[key] for row in rows] for name, key in series.items()})
    axes.set_ylabel("milliseconds an image")


def _rounded(multiple: int) -> str:
    return "plain" if multiple == 1 else f"rounded to {multiple}"
