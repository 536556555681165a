"""What the pass itself costs: capture, planning and rewriting, beside Inductor's cold compile.

    python -m benchmarks.capture_time

ViT-B/16 (random weights) with 12 and 48 blocks, and a table of seconds. Nothing is timed twice in
one process but the warm-up, a two-block model; Inductor starts with empty caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.results import OUT, Results, cell, stacks
from tomepass import ToMe, TomeBackend
from tomepass.capture.exported import capture_module
from tomepass.planning.plan_graph import plan_graph
from tomepass.rewriting.sweep import rewrite

STAGES = ("capture", "plan", "rewrite")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    r: Annotated[int, typer.Option(help="Tokens merged a block of the 48-block model.")] = 4,
    compiled: Annotated[bool, typer.Option(help="Compile the 12-block model too.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = OUT,
) -> None:
    """Prints seconds of each stage for 12 and 48 blocks, and of a cold compile."""
    torch.manual_seed(0)
    _stages(vit(2), r)  # what is imported and built once
    rows: list[dict[str, Any]] = []
    for blocks in (12, 48):
        rows.append({"blocks": blocks} | dict(zip(STAGES, _stages(vit(blocks), r), strict=True)))
    settings: dict[str, Any] = {"r": r}
    if compiled:
        settings |= _cold_compiles()
    Results(
        name="capture_time",
        title=f"The pass on ViT-B/16 224, r={r}, seconds",
        columns={"blocks": cell("blocks")}
        | {stage: cell(stage, "{:.2f}") for stage in STAGES}
        | {"in all": lambda row: f"{sum(row[stage] for stage in STAGES):.2f}"},
        rows=rows,
        settings=settings,
        plot=_plot,
    ).publish(out)
    whole = [sum(row[stage] for stage in STAGES) for row in rows]
    print(f"48 blocks take {whole[1] / whole[0]:.1f} times what 12 take")
    if compiled:
        for form in ("unmerged", "merged"):
            seconds = settings[f"{form} cold"]
            print(f"Inductor, {form}: {seconds:.1f} s cold; the pass is {whole[0] / seconds:.0%}")


def _plot(axes: Any, rows: Any) -> None:
    labels = [f"{row['blocks']} blocks" for row in rows]
    stacks(axes, labels, {stage: [row[stage] for row in rows] for stage in STAGES})
    axes.set_ylabel("seconds")


def vit(blocks: int) -> nn.Module:
    """ViT-B/16 with random weights and another depth."""
    model: nn.Module = ViTForImageClassification(ViTConfig(num_hidden_layers=blocks))
    return model.eval()


def _stages(model: nn.Module, r: int) -> tuple[float, float, float]:
    inputs = {"pixel_values": torch.randn(2, 3, 224, 224)}
    capture, first = _timed(lambda: capture_module(model, inputs))
    planned, second = _timed(lambda: plan_graph(capture.graph, ToMe(r)))
    _, third = _timed(lambda: rewrite(capture.graph, planned))
    return first, second, third


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def _cold_compiles() -> dict[str, float]:
    """Seconds that Inductor takes for 12 blocks, float32 and batch 2, with empty caches."""
    pixels = torch.randn(2, 3, 224, 224)
    return {
        "unmerged cold": _cold_compile(vit(12), pixels, "inductor"),
        "merged cold": _cold_compile(vit(12), pixels, TomeBackend(ToMe(16))),
    }


def _cold_compile(model: nn.Module, pixels: Tensor, backend: Any) -> float:
    torch.compiler.reset()
    with torch.no_grad(), fresh_cache():
        return _timed(lambda: torch.compile(model, backend=backend)(pixels))[1]


if __name__ == "__main__":
    app()
