"""Seconds of the first call, each in a process of its own: with empty caches, and with filled ones.

    python -m benchmarks compile-time --model vit_base --r 16

*Start-up* is what one linear layer takes: what any first compilation costs on this machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from benchmarks.results import OUT, Results, bars, cell

FORMS = ("start-up", "unmerged", "merged")

CACHES = ("empty", "filled")


def main(
    model: Annotated[str, typer.Option(help="As in throughput.")] = "vit_base",
    r: Annotated[str, typer.Option(help="Tokens merged a block.")] = "16",
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 16,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    rounds: Annotated[int, typer.Option(min=1, help="Processes for each figure.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = OUT,
) -> None:
    """Print seconds of the first call of both forms, and the kernels that were compiled."""
    rows = []
    settings = [(freezing, turn) for freezing in (False, True) for turn in range(rounds)]
    for freezing, turn in track(settings, "compiling"):
        cold, warm = ({"freezing": freezing, "turn": turn, "caches": c} for c in CACHES)
        for form in FORMS:
            with tempfile.TemporaryDirectory() as cache:
                for row in (cold, warm):
                    row[form] = _first_call(form, freezing, cache, model, r, batch, dtype)
                cold[f"{form} files"] = warm[f"{form} files"] = len(list(Path(cache).rglob("*.so")))
        rows += [cold, warm]
    Results(
        name="compile_time",
        title=f"{model}, r={r}, batch {batch}, {dtype}, inductor: seconds of the first call",
        columns={"freezing": lambda row: "on" if row["freezing"] else "off"}
        | {"caches": cell("caches")}
        | {form: cell(form, "{:.1f}") for form in FORMS}
        | {"merged / unmerged": lambda row: f"{row['merged'] / row['unmerged']:.2f}x"}
        | {"kernel files": lambda row: f"{row['unmerged files']} -> {row['merged files']}"},
        rows=rows,
        settings={"model": model, "r": r, "batch": batch, "dtype": dtype},
        plot=_plot,
    ).publish(out)


def _plot(axes: Any, rows: Any) -> None:
    labels = [f"{row['caches']} caches{', freezing' * row['freezing']}" for row in rows]
    bars(axes, labels, {form: [row[form] for row in rows] for form in FORMS})
    axes.set_ylabel("seconds of the first call")


def _first_call(form: str, freezing: bool, cache: str, *of: Any) -> float:
    """Seconds of the first call in a fresh process."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "TORCHINDUCTOR_FREEZING": str(int(freezing)),
    }
    command = [sys.executable, "-m", "benchmarks.compile_time", form, *map(str, of)]
    root = Path(__file__).parents[1]
    run = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RuntimeError(f"{form} could not be compiled: {run.stderr}")
    return float(run.stdout.split()[-1])


def _compile(form: str, name: str, r: str, batch: str, dtype: str) -> None:
    """Prints the seconds: the other side of :func:`_first_call`."""
    import time

    import torch

    from benchmarks.cpu.throughput import make_model
    from tomepass import ToMe, TomeBackend
    from tomepass.cli.options import parse_dtype, parse_r
    from tomepass.sources.examples import example_inputs

    wide = parse_dtype(dtype)
    model: Any
    if form == "start-up":
        model, inputs = torch.nn.Linear(8, 8).to(wide), {"input": torch.ones(2, 8, dtype=wide)}
    else:
        model = make_model(name).to(wide)
        inputs = example_inputs(model, int(batch))
    backend: Any = TomeBackend(ToMe(parse_r(r))) if form == "merged" else "inductor"
    compiled: Any = torch.compile(model, backend=backend)
    with torch.no_grad():
        started = time.perf_counter()
        compiled(**inputs)
        print(time.perf_counter() - started)


if __name__ == "__main__":
    _compile(*sys.argv[1:])
