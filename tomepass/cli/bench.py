"""The job behind ``tomepass bench``: several methods and options, measured, printed, written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn

from tomepass.errors import TomeError
from tomepass.measuring.environment import environment
from tomepass.measuring.measure import measure, steps
from tomepass.measuring.speed_plot import speed_plot
from tomepass.measuring.table import bench_table
from tomepass.measuring.values import Measurement, to_json
from tomepass.methods import Method
from tomepass.printing.style import progress_bar
from tomepass.sources.examples import example_inputs

if TYPE_CHECKING:
    from tomepass.handover.compiling.inner import Inner


def option_sets(backend: str, freezing: bool, both: bool) -> list[dict[str, Any]]:
    """The backend options to measure with, one set after the other.

    Raises:
        TomeError: if freezing is asked of another backend than Inductor, which alone has it.
    """
    if backend != "inductor":
        if freezing or both:
            raise TomeError(f"freezing is an option of inductor, the backend is {backend!r}")
        return [{}]
    return [{"freezing": value} for value in ((False, True) if both else (freezing,))]


def checked_device(device: str) -> str:
    """The device, if it is here.

    Raises:
        TomeError: if it is not.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise TomeError(f"device {device!r} is not available here", advice="use --device cpu")
    return device


def run_bench(
    model: nn.Module,
    label: str,
    methods: Sequence[Method],
    options: Sequence[dict[str, Any]],
    *,
    backend: Inner = "inductor",
    batch: int = 16,
    rounds: int = 10,
    cold: bool = False,
) -> list[Measurement]:
    """Every method with every set of options, under a progress bar on standard error.

    Inputs are random, at the model's configured resolution, in its dtype.
    """
    inputs = example_inputs(model, batch)
    with progress_bar() as progress:
        task = progress.add_task("", total=steps(rounds) * len(methods) * len(options))

        def saying(what: str) -> Callable[[str], None]:
            return lambda step: progress.update(task, description=f"{what}: {step}", advance=1)

        return [
            measure(
                model,
                inputs,
                method,
                inner=backend,
                inner_options=chosen,
                rounds=rounds,
                cold=cold,
                label=label,
                progress=saying(repr(method.schedule)),
            )
            for chosen in options
            for method in methods
        ]


def write_bench(measured: Sequence[Measurement], out: Path, *, as_json: bool = False) -> None:
    """Writes ``throughput.json`` and ``throughput.png``; prints the table, or the JSON."""
    where = environment()
    text = to_json(measured, where)
    out.mkdir(parents=True, exist_ok=True)
    (out / "throughput.json").write_text(text + "\n")
    speed_plot(measured, out / "throughput.png", where)
    if as_json:
        print(text)
        return
    console = Console()
    console.print(bench_table(measured, where))
    console.print(f"written: {out / 'throughput.json'}, {out / 'throughput.png'}")
