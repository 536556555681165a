"""The command line: ``tomepass demo | explain | check | bench | export``."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tomepass.cli.options import MultiValueCommand, errors_told, parse_r
from tomepass.errors import TomeError

app = typer.Typer(
    help="Token merging for Vision Transformers, as a compiler pass.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


Model = Annotated[str, typer.Option(help="Model directory (save_pretrained) or hub id.")]

R = Annotated[
    str, typer.Option(help="Tokens merged a block: 16, a list 16,16,8 or a pair (13,-1).")
]


Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]

Batch = Annotated[int, typer.Option(min=1, help="Images a batch.")]

Backend = Annotated[str, typer.Option(help="What compiles: inductor, eager, openvino ...")]

Device = Annotated[str, typer.Option(help="cpu or cuda.")]

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


def _quiet() -> None:
    """No progress bar of transformers for every model that is loaded."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Errors a user can mend are printed as such, without a traceback; exit status 2."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        with errors_told():
            _quiet()
            command(*args, **kwargs)

    return run


@app.command(cls=MultiValueCommand)
@_reported
def demo(
    model: Annotated[str | None, typer.Option(help="Model directory or hub id.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images.")] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV or TSV: file name, class.")] = None,
    r: Annotated[list[int] | None, typer.Option(help="Tokens merged a block; several.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the plot.")] = Path(
        "tomepass-demo"
    ),
    batch: Batch = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 10,
    limit: Annotated[int | None, typer.Option(min=1, help="Use this many images.")] = None,
) -> None:
    """Explain, check and measure a model; draw its merged tokens. No arguments: a small one."""
    from tomepass.cli.demo import run_demo

    run_demo(Console(), model, images, labels, r, out, batch, rounds, limit)


@app.command()
@_reported
def explain(
    model: Model,
    r: R = "16",
    prop_attn: Annotated[bool, typer.Option(help="Proportional attention.")] = True,
    json_: Json = False,
) -> None:
    """Show what would be merged, what it saves, and what is refused and why."""
    import tomepass
    from tomepass.sources.models import load_model

    method = tomepass.ToMe(r=parse_r(r), prop_attn=prop_attn)
    report = tomepass.explain(load_model(model), method)
    _show(report, json_)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
@_reported
def check(
    model: Model,
    r: R = "16",
    images: Annotated[Path | None, typer.Option(help="Real images; else random input.")] = None,
    dtype: Dtype = "fp32",
    batch: Batch = 4,
    backend: Backend = "inductor",
    device: Device = "cpu",
    prop_attn: Annotated[bool, typer.Option(help="Proportional attention.")] = True,
    json_: Json = False,
) -> None:
    """Prove that the merged, compiled model computes what it should. Exit status 1 if not."""
    from rich.progress import Progress, SpinnerColumn, TextColumn

    import tomepass

    method = tomepass.ToMe(r=parse_r(r), prop_attn=prop_attn)
    loaded, inputs = _model_and_inputs(model, images, dtype, batch, device)
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("capturing")
        report = tomepass.check(
            loaded,
            inputs,
            method,
            inner=backend,
            progress=lambda name: progress.update(task, description=name),
        )
    _show(report, json_)
    if not report.ok:
        raise typer.Exit(1)


@app.command(cls=MultiValueCommand)
@_reported
def bench(
    model: Model,
    r: Annotated[list[str] | None, typer.Option(help="As above; several. Default 8 16.")] = None,
    dtype: Dtype = "fp32",
    batch: Batch = 16,
    backend: Backend = "inductor",
    device: Device = "cpu",
    freezing: Annotated[
        bool, typer.Option(help="Inductor keeps weights as constants, for inference.")
    ] = False,
    both: Annotated[bool, typer.Option("--both", help="Without and with freezing.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 10,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the plot.")] = Path(
        "tomepass-bench"
    ),
    json_: Json = False,
) -> None:
    """Measure merged against unmerged, both compiled alike, interleaved in one process."""
    from tomepass.cli.bench import checked_device, option_sets, run_bench, write_bench
    from tomepass.cli.options import parse_dtype
    from tomepass.methods import ToMe
    from tomepass.sources.models import load_model

    methods = [ToMe(parse_r(text)) for text in r or ("8", "16")]
    options = option_sets(backend, freezing, both)
    place = {"device": checked_device(device), "dtype": parse_dtype(dtype)}
    loaded = load_model(model).to(**place)
    label = Path(model).expanduser().name
    measured = run_bench(
        loaded, label, methods, options, backend=backend, batch=batch, rounds=rounds
    )
    write_bench(measured, out, as_json=json_)


@app.command()
@_reported
def export(
    model: Model,
    to: Annotated[str, typer.Option(help="pt2, aoti, onnx, openvino or tensorrt.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write.")],
    r: Annotated[
        str | None, typer.Option(help="As in explain. Default: as saved with the model, or 16.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan's JSON file, instead of --r.")] = None,
    dynamic: Annotated[
        str, typer.Option(help="batch: any batch size; none: the size of --batch.")
    ] = "batch",
    batch: Batch = 8,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16. Default: as the model was saved.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Relative error allowed. Default: 1e-3, in bf16 and fp16 0.5."),
    ] = None,
    timed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure against the unmerged model.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write the merged model for another runtime, run it there, and print how close it is."""
    from rich.progress import Progress, SpinnerColumn, TextColumn

    from tomepass.cli.chosen import chosen_method
    from tomepass.cli.options import parse_dtype
    from tomepass.formats import door
    from tomepass.formats.artifacts import Writing, check_path, write_artifact

    check_path(out, door(to), force)
    any_batch = _any_batch(dynamic)
    source, method, outputs = chosen_method(model, None if r is None else parse_r(r), plan)
    if dtype is not None:
        source = source.to(parse_dtype(dtype))
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    with errors_told(OSError), progress:  # a disk that is full, a folder that is not ours
        task = progress.add_task("loading")
        written = write_artifact(
            source,
            method,
            to,
            out,
            Writing(any_batch, batch, timed, tolerance=tolerance, outputs=outputs),
            force=force,
            progress=lambda step: progress.update(task, description=step),
        )
    console = Console()
    console.print(written.table())
    console.print(f"written: {out}")


def _any_batch(dynamic: str) -> bool:
    if dynamic not in ("batch", "none"):
        raise TomeError(
            f"--dynamic {dynamic}: the batch alone can be dynamic, since a merge counts the "
            "tokens there are: the resolution is fixed",
            advice="export once for each resolution, with --dynamic batch or none",
        )
    return dynamic == "batch"


def _model_and_inputs(
    name: str, images: Path | None, dtype: str, batch: int, device: str
) -> tuple[Any, Any]:
    from tomepass.cli.bench import checked_device
    from tomepass.cli.options import parse_dtype
    from tomepass.sources.examples import example_inputs
    from tomepass.sources.images import load_images
    from tomepass.sources.models import load_model

    place = {"device": checked_device(device), "dtype": parse_dtype(dtype)}
    model = load_model(name).to(**place)
    if images is None:
        return model, example_inputs(model, batch)
    return model, load_images(model, name, images, limit=batch).pixel_values.to(**place)


def _show(report: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        Console().print(report)
