"""Every benchmark behind one front: ``python -m benchmarks NAME --help``."""

from __future__ import annotations

import typer

from benchmarks.accuracy import accuracy, policy
from benchmarks.cpu import (
    adaptive,
    attention,
    breakdown,
    capture_time,
    compile_time,
    kernels,
    latency,
    linear,
    scaling,
    throughput,
)
from benchmarks.formats import formats as doors
from benchmarks.formats import openvino_layers, quantization, tensorrt
from benchmarks.gpu import command as gpu
from tomepass.cli.options import MultiValueCommand

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Measure tomepass on this machine; the unmerged compiled model is always in the same run.",
)


app.command("throughput", cls=MultiValueCommand)(throughput.main)

app.command("accuracy", cls=MultiValueCommand)(accuracy.main)

app.command("adaptive", cls=MultiValueCommand)(adaptive.main)

app.command("latency", cls=MultiValueCommand)(latency.main)

app.command("breakdown")(breakdown.main)

app.command("scaling", cls=MultiValueCommand)(scaling.main)

app.command("attention", cls=MultiValueCommand)(attention.main)

app.command("kernels", cls=MultiValueCommand)(kernels.main)

app.command("linear", cls=MultiValueCommand)(linear.main)

app.command("gpu")(gpu.main)

app.command("policy", cls=MultiValueCommand)(policy.main)

app.command("doors", cls=MultiValueCommand)(doors.main)

app.command("tensorrt", cls=MultiValueCommand)(tensorrt.main)

app.command("quantization", cls=MultiValueCommand)(quantization.main)

app.command("openvino-layers")(openvino_layers.main)

app.command("compile-time")(compile_time.main)

app.command("capture-time")(capture_time.main)

if __name__ == "__main__":
    app()
