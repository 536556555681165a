"""All that is to be known of an NVIDIA GPU, in commands of some minutes each.

    python -m benchmarks gpu --quarter
    python -m benchmarks gpu --only kernels
    python -m benchmarks gpu --only vit_b --r 16 --mode max-autotune

The first one spends a quarter of an hour on what is worth most. Models come from configurations
with random weights: no network, no data folder. Each command writes its own table and JSON
(``gpu_NAME_MODE_rN_DTYPE.json``, mode and r where it has them). With ``--tiny`` everything runs on
a tiny model, and on a CPU in Triton's interpreter where no GPU is at hand: that says what works,
not how fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.gpu import kernels as gpu_kernels
from benchmarks.gpu import whole
from benchmarks.gpu.correctness import correctness
from benchmarks.gpu.models import SETTINGS, TINY, TRAINING
from benchmarks.gpu.profile import profiled
from benchmarks.gpu.publishing import Asked, publish
from benchmarks.gpu.quarter import quarter_of_an_hour
from benchmarks.results import OUT
from tomepass.cli.options import parse_dtype

MODES = ("default", "reduce-overhead", "max-autotune")

NAMES = (
    *(*SETTINGS, "training", "memory", "profile", "plan"),
    *("correctness", "check", "kernels", "bandwidth", "attention", "attention_72"),
)


Rows = Iterable[dict[str, Any]]


def main(
    quarter: Annotated[
        bool, typer.Option("--quarter", help="What is worth most on a device, until time is up.")
    ] = False,
    minutes: Annotated[
        float, typer.Option(min=0, help="For --quarter, and for --only correctness.")
    ] = 15.0,
    only: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}.")] = "kernels",
    mode: Annotated[str, typer.Option(help=f"Of Inductor: {', '.join(MODES)}.")] = "max-autotune",
    r: Annotated[int | None, typer.Option(help="One of a setting's counts; all of them.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 10,
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny model, anywhere.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = OUT,
) -> None:
    """Measure one part of the GPU benchmark, or what is worth most, and write its table."""
    asked = Asked(only, mode, r, dtype, rounds, tiny, minutes)
    _refuse(asked)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if quarter:
        raise typer.Exit(quarter_of_an_hour(asked, out))
    publish(asked, measured(asked, device), device, out)
    # Terminals cut wide tables.
    typer.echo((out / f"{asked.file}.md").read_text())


def _refuse(asked: Asked) -> None:
    only, mode, r = asked.only, asked.mode, asked.r
    if only not in NAMES:
        raise typer.BadParameter(f"--only takes {', '.join(NAMES)}, got {only!r}")
    if mode not in MODES:
        raise typer.BadParameter(f"--mode takes {', '.join(MODES)}, got {mode!r}")
    counts = (TINY if asked.tiny else SETTINGS[only]).counts if only in SETTINGS else ()
    if r is not None and r not in counts:
        raise typer.BadParameter(f"--r with --only {only} takes one of {list(counts)}, got {r}")
    parse_dtype(asked.dtype)
    if not (torch.cuda.is_available() or asked.tiny):
        raise typer.BadParameter("no CUDA device here; --tiny runs everything small on a CPU")


def measured(asked: Asked, device: torch.device) -> Rows:
    """The rows of one part."""
    only, mode, rounds, tiny = asked.only, asked.mode, asked.rounds, asked.tiny
    dtype = parse_dtype(asked.dtype)
    if only in SETTINGS:
        setting = TINY if tiny else SETTINGS[only]
        counts = setting.counts if asked.r is None else (asked.r,)
        return (whole.compared(setting, r, mode, dtype, rounds, device) for r in counts)
    setting = TINY if tiny else SETTINGS["vit_b"]
    training, alone = (TINY, TINY) if tiny else (TRAINING, SETTINGS["batch1"])
    parts: dict[str, Callable[[], Rows]] = {
        "training": lambda: whole.trained(training, mode, dtype, rounds, device),
        "memory": lambda: whole.memory(setting, training, dtype, device),
        "profile": lambda: profiled(setting, mode, dtype, rounds, device),
        "plan": lambda: whole.planned(alone, mode, dtype, rounds, device),
        "correctness": lambda: correctness(dtype, device, asked.minutes, tiny),
        "check": lambda: whole.checked(setting, dtype, device),
        "kernels": lambda: gpu_kernels.correct(dtype, device, tiny),
        "bandwidth": lambda: gpu_kernels.bandwidth(dtype, rounds, device, tiny),
        "attention": lambda: gpu_kernels.attention(64, dtype, rounds, device, tiny),
        "attention_72": lambda: gpu_kernels.attention(72, dtype, rounds, device, tiny),
    }
    return parts[only]()
