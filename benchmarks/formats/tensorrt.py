"""A model and its merged form as TensorRT engines: how close, how fast, how many engines.

    python -m benchmarks tensorrt --model vit_base --r 8 16 --batch 16

Needs an NVIDIA GPU, TensorRT and torch_tensorrt (``pip install 'tomepass[tensorrt]'``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import tomepass
from benchmarks.cpu.throughput import SIZES, make_model
from benchmarks.results import OUT, Results, bars, cell
from tomepass import ToMe, TomeError
from tomepass.cli.options import errors_told, parse_dtype, parse_r
from tomepass.formats import DOORS
from tomepass.formats.exporting import export_unmerged
from tomepass.measuring.turns import medians_in_turns
from tomepass.sources.examples import example_inputs

COLUMNS = {
    "r": cell("r"),
    "engines": cell("engines"),
    "relative error": cell("relative error", "{:.0e}"),
    "same top-1": cell("same top-1", "{:.0%}"),
    "ms unmerged": cell("ms unmerged", "{:.2f}"),
    "ms merged": cell("ms merged", "{:.2f}"),
    "speed-up": cell("speed-up", "{:.2f}x"),
    "MAC-ideal": cell("ideal", "{:.2f}x"),
}


def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(SIZES)}, or a directory.")] = "vit_base",
    r: Annotated[list[str] | None, typer.Option(help="Several. Default 8 16.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 16,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp16",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = OUT,
) -> None:
    """Print a row an r: merged engines against the unmerged model's, interleaved."""
    with errors_told():
        DOORS["tensorrt"].check()
        if not torch.cuda.is_available():
            raise TomeError("TensorRT needs a CUDA device, and there is none")
        subject = make_model(model).to("cuda", parse_dtype(dtype))
        rows = [
            _row(subject, ToMe(parse_r(text)), text, batch, rounds) for text in r or ("8", "16")
        ]
    label = Path(model).expanduser().name
    Results(
        name="tensorrt",
        title=f"{label}, batch {batch}, {dtype}, TensorRT, {torch.cuda.get_device_name()}",
        columns=COLUMNS,
        rows=rows,
        settings={"model": label, "batch": batch, "dtype": dtype, "rounds": rounds},
        plot=lambda axes, rows: bars(
            axes, [f"r={row['r']}" for row in rows], {"speed-up": [r["speed-up"] for r in rows]}
        ),
    ).publish(out)


def _row(subject: nn.Module, method: ToMe, r: str, batch: int, rounds: int) -> dict[str, Any]:
    from tomepass.formats.tensorrt_program import compile_program, engines

    inputs = example_inputs(subject, batch)
    merged = tomepass.apply(subject, method, example_inputs=inputs)
    compiled = [
        compile_program(program)
        for program in (
            export_unmerged(subject, example_inputs=inputs, dynamic_batch=False),
            tomepass.export(subject, method, example_inputs=inputs, dynamic_batch=False),
        )
    ]

    def run(which: int) -> torch.Tensor:
        (logits,) = torch.utils._pytree.tree_leaves(compiled[which](**inputs))[:1]
        torch.cuda.synchronize()
        return logits  # type: ignore[no-any-return]

    with torch.no_grad():
        ours, theirs = run(1).double(), merged(**inputs).logits.double()
    before, after = medians_in_turns([lambda: run(0), lambda: run(1)], rounds, 10)
    report = merged.tome.report(inputs)
    return {
        "r": r,
        "engines": engines(compiled[1]),
        "engines unmerged": engines(compiled[0]),
        "relative error": float((ours - theirs).norm() / theirs.norm()),
        "same top-1": float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
        "ms unmerged": before,
        "ms merged": after,
        "speed-up": before / after,
        "ideal": report.speedup_ideal,
    }
