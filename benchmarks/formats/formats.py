"""Every door: how close what it wrote is to ``apply``, and its speed against the unmerged model.

    python -m benchmarks doors --model vit_base --r 16 --batch 16 --threads 2

Both models are exported, written and run the same way; calls are interleaved. The relative error
is in the outputs, the greatest over batches of 1, 2 and 7. OpenVINO stands there twice: in float32,
and in what it chooses itself, bfloat16 where the processor has matrix units for it (there it may
match other tokens than float32 does, so that its errors are those of other merges).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console

import tomepass
from benchmarks.cpu.throughput import SIZES, make_model
from benchmarks.results import OUT, Results, bars, cell
from tomepass import ToMe, TomeError
from tomepass.cli.options import errors_told, parse_r
from tomepass.formats import DOORS
from tomepass.formats.artifacts import Writing, write_artifact
from tomepass.sources.examples import example_inputs


class Measured(NamedTuple):
    """A format, and how its files are run."""

    to: str
    options: dict[str, Any]
    tolerance: float


MEASURED: dict[str, Measured] = {
    "pt2": Measured("pt2", {}, 1e-3),
    "aoti": Measured("aoti", {}, 1e-3),
    "onnx": Measured("onnx", {}, 1e-3),
    "openvino": Measured("openvino", {}, 1e-3),
    "openvino-auto": Measured("openvino", {"precision": None}, float("inf")),
    "tensorrt": Measured("tensorrt", {}, 1e-3),
}


COLUMNS = {
    "door": cell("door"),
    "runtime": cell("runtime"),
    "max error": cell("max error", "{:.0e}"),
    "relative error": cell("relative error", "{:.0e}"),
    "ms unmerged": cell("ms unmerged", "{:.0f}"),
    "ms merged": cell("ms merged", "{:.0f}"),
    "speed-up": cell("speed-up", "{:.2f}x"),
    "MAC-ideal": cell("ideal", "{:.2f}x"),
}


def main(
    model: Annotated[
        str, typer.Option(help=f"{', '.join(SIZES)}, or a model directory.")
    ] = "vit_base",
    r: Annotated[str, typer.Option(help="Tokens merged a block.")] = "16",
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 16,
    to: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(MEASURED)}; several. Default: all here.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of every runtime.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = OUT,
) -> None:
    """Print a row a door; what is not installed is said and left out, unless it was asked for."""
    torch.set_num_threads(threads)
    console = Console(stderr=True)
    with errors_told():
        subject = make_model(model)
        method = ToMe(parse_r(r))
        report = tomepass.explain(subject, method, example_inputs=example_inputs(subject, 2))
        rows = []
        for name in to or MEASURED:
            try:
                rows.append(_row(subject, method, name, batch) | {"ideal": report.speedup_ideal})
            except TomeError as error:
                if to:
                    raise
                console.print(f"left out: {name}: {error.reason}")
    label = Path(model).expanduser().name
    Results(
        name="doors",
        title=f"{label}, r={r}, batch {batch}, float32, the same door unmerged",
        columns=COLUMNS,
        rows=rows,
        settings={"model": label, "r": r, "batch": batch, "threads": threads},
        plot=_plot,
    ).publish(out)


def _row(subject: Any, method: ToMe, name: str, batch: int) -> dict[str, Any]:
    if name not in MEASURED:
        raise TomeError(f"no door {name!r}", advice=f"one of {', '.join(MEASURED)}")
    asked = MEASURED[name]
    form = DOORS[asked.to]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"merged{form.suffix}"
        how = Writing(batch=batch, options=asked.options, tolerance=asked.tolerance)
        written = write_artifact(subject, method, asked.to, path, how)
        size = sum(file.stat().st_size for file in path.parent.iterdir())
    assert written.milliseconds is not None
    assert written.speedup is not None
    return {
        "door": name,
        "runtime": _runtime(form.needs, form.runtime),
        "max error": max(row.max_error for row in written.parity),
        "relative error": max(row.relative_error for row in written.parity),
        "same top-1": min(row.same_top1 or 0.0 for row in written.parity),
        "ms unmerged": written.milliseconds[0],
        "ms merged": written.milliseconds[1],
        "speed-up": written.speedup,
        "MB": size / 1e6,
    }


def _runtime(needs: tuple[str, ...], name: str) -> str:
    from importlib.metadata import version

    package = needs[-1].replace("_", "-") if needs else "torch"
    return f"{name} {version(package).split('+')[0].split('-')[0]}"


def _plot(axes: Any, rows: Any) -> None:
    labels = [row["door"] for row in rows]
    bars(axes, labels, {"measured": [row["speed-up"] for row in rows]})
    axes.axhline(rows[0]["ideal"], linestyle="--", color="grey", linewidth=1)
    axes.set_ylabel("speed-up, unmerged over merged")
