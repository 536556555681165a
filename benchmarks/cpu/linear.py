"""How fast linear layers alone are at each number of rows: tokens times images.

    python -m benchmarks linear --rows 1576 1320 1280

Packed as Inductor's freezing packs them, in bfloat16, without bias. A rate that falls where rows do
is lost to merging, whatever the pass does.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.results import OUT, Results, cell, lines
from tomepass.measuring.turns import medians_in_turns

SHAPES = {"768 to 768": (768, 768), "768 to 3072": (768, 3072), "3072 to 768": (3072, 768)}


def main(
    rows: Annotated[
        list[int] | None, typer.Option(help="Default 3152 1576 1320 1280 640 320 160.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 11,
    threads: Annotated[int | None, typer.Option(min=1, help="PyTorch's threads.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = OUT,
) -> None:
    """Print 10^9 multiply-accumulates a second of each layer of a ViT-B at several rows."""
    if threads is not None:
        torch.set_num_threads(threads)
    found = [_rates(count, rounds) for count in rows or (3152, 1576, 1320, 1280, 640, 320, 160)]

    def plot(axes: Any, rows: Any) -> None:
        series = {name: [row[name] for row in rows] for name in SHAPES}
        lines(axes, [row["rows"] for row in rows], series)
        axes.set_xlabel("rows: tokens times images")
        axes.set_ylabel("10^9 multiply-accumulates a second")

    Results(
        name="linear",
        title="Packed linear layers, bf16: 10^9 multiply-accumulates a second",
        columns={"rows": cell("rows")} | {name: cell(name, "{:.0f}") for name in SHAPES},
        rows=found,
        settings={"dtype": "bf16", "rounds": rounds},
        plot=plot,
    ).publish(out)


def _rates(rows: int, rounds: int) -> dict[str, float]:
    mkldnn: Any = torch.ops.mkldnn
    runs = []
    for before, after in SHAPES.values():
        weight = mkldnn._reorder_linear_weight(torch.randn(after, before).bfloat16(), rows)
        x = torch.randn(rows, before).bfloat16()
        packed: Any = (x, weight, None, "none", [], "")
        runs.append(functools.partial(mkldnn._linear_pointwise, *packed))
    seconds = [ms / 1000 for ms in medians_in_turns(runs, rounds, calls=6)]
    macs = [rows * before * after for before, after in SHAPES.values()]
    rates = [count / taken / 1e9 for count, taken in zip(macs, seconds, strict=True)]
    return {"rows": rows, **dict(zip(SHAPES, rates, strict=True))}
