"""What the pass itself costs: capture, planning and rewriting, beside Inductor's cold compile.

    python -m benchmarks.capture_time

ViT-B/16 (random weights) with 12 and 48 blocks, and a table of seconds. Nothing is timed twice in
one process but the warm-up, a two-block model; Inductor starts with empty caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from transformers import ViTConfig, ViTForImageClassification

from tomepass import ToMe, TomeBackend
from tomepass.capture import capture_module
from tomepass.planning import plan_graph
from tomepass.rewrite import rewrite
from tomepass.tables import table

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    r: Annotated[int, typer.Option(help="Tokens merged a block of the 48-block model.")] = 4,
    compiled: Annotated[bool, typer.Option(help="Compile the 12-block model too.")] = True,
) -> None:
    """Prints seconds of each stage for 12 and 48 blocks, and of a cold compile."""
    torch.manual_seed(0)
    _stages(vit(2), r)  # what is imported and built once
    shown = table("ViT-B/16 224, seconds", "blocks", "capture", "plan", "rewrite", "in all")
    totals = {}
    for blocks in (12, 48):
        seconds = _stages(vit(blocks), r)
        totals[blocks] = sum(seconds)
        shown.add_row(str(blocks), *(f"{s:.2f}" for s in (*seconds, totals[blocks])))
    console = Console()
    console.print(shown)
    console.print(f"48 blocks take {totals[48] / totals[12]:.1f} times what 12 take")
    if compiled:
        _compare(console, totals[12])


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


def _compare(console: Console, own: float) -> None:
    pixels = torch.randn(2, 3, 224, 224)
    for name, backend in (("unmerged", "inductor"), ("merged, r=16", TomeBackend(ToMe(16)))):
        seconds = _cold_compile(vit(12), pixels, backend)
        console.print(
            f"Inductor, {name}: {seconds:.1f} s cold; the pass is {own / seconds:.0%} of it"
        )


def _cold_compile(model: nn.Module, pixels: Tensor, backend: Any) -> float:
    torch.compiler.reset()
    with torch.no_grad(), fresh_cache():
        return _timed(lambda: torch.compile(model, backend=backend)(pixels))[1]


if __name__ == "__main__":
    app()
