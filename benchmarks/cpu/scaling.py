"""From 197 tokens to 4097: the same ViT at larger images, the same share of tokens merged a block.

    python -m benchmarks scaling --sizes 224 384 512

Positions are drawn for each size; speed does not depend on them. Longer sequences spend more of
their time in attention, which falls with the square of the tokens: merging gains more there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.cpu.throughput import SIZES, make_model
from benchmarks.results import COMPARED, OUT, Results, cell, compared, lines
from tomepass import ToMe
from tomepass.cli.options import MultiValueCommand, parse_dtype
from tomepass.measuring.measure import measure
from tomepass.measuring.values import Measurement

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=MultiValueCommand)
def main(
    model: Annotated[str, typer.Option(help=f"{', '.join(SIZES)}.")] = "vit_base",
    sizes: Annotated[list[int] | None, typer.Option(help="Pixels a side.")] = None,
    share: Annotated[float, typer.Option(help="Of the tokens, merged in each block.")] = 0.08,
    images: Annotated[int, typer.Option(min=1, help="A call at 224 pixels; fewer above.")] = 8,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 6,
    threads: Annotated[int | None, typer.Option(min=1, help="PyTorch's threads.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = OUT,
) -> None:
    """Print speed-up and peak memory, merged against unmerged, at each size."""
    if threads is not None:
        torch.set_num_threads(threads)
    rows = []
    for pixels in sizes or (224, 384, 512, 1024):
        tokens = (pixels // 16) ** 2 + 1
        batch, r = max(1, images * 197 // tokens), round(share * tokens)
        found = _measured(model, pixels, r, batch, dtype, rounds)
        rows.append({"tokens": tokens, "batch": batch, "r": r, **compared(found)})

    def plot(axes: Any, rows: Any) -> None:
        series = {"measured": "speed-up", "ideal, by multiply-accumulates": "ideal"}
        across = [row["tokens"] for row in rows]
        lines(axes, across, {name: [row[key] for row in rows] for name, key in series.items()})
        axes.set_xlabel("tokens")
        axes.set_ylabel("speed-up over unmerged")

    Results(
        name="scaling",
        title=f"{model}, {dtype}, {share:.0%} of the tokens a block, inductor with freezing",
        columns={name: cell(name) for name in ("tokens", "batch", "r")} | COMPARED,
        rows=rows,
        settings={"model": model, "dtype": dtype, "share": share, "rounds": rounds},
        plot=plot,
    ).publish(out)


def _measured(name: str, pixels: int, r: int, batch: int, dtype: str, rounds: int) -> Measurement:
    model = make_model(name, pixels=pixels).to(parse_dtype(dtype))
    inputs = torch.randn(batch, 3, pixels, pixels).to(parse_dtype(dtype))
    freezing = {"freezing": True}
    return measure(model, inputs, ToMe(r), inner_options=freezing, rounds=rounds, label=name)


if __name__ == "__main__":
    app()
