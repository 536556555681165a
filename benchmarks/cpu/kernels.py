"""Matching and merging alone, against a plain copy of the bytes they cannot avoid.

    python -m benchmarks kernels --tokens 197 133 69

Both as the composite operators, compiled by Inductor for one shape, and as kernels of their own.
Matching must read the keys, merging must read and write the tokens; a copy of as many bytes is
what the memory allows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.results import OUT, Results, bars, cell
from tomepass.cli.options import MultiValueCommand, parse_dtype
from tomepass.kernels.cpu import match_cpu, merge_cpu
from tomepass.measuring.turns import medians_in_turns
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

WIDTH, HEADS, PROTECTED = 768, 12, [0]

# What is measured, and the copy that it stands beside.
COLUMNS = {
    "copy of keys": None,
    "match": "copy of keys",
    "match_cpu": "copy of keys",
    "copy of tokens": None,
    "merge": "copy of tokens",
    "merge_cpu": "copy of tokens",
}


@app.command(cls=MultiValueCommand)
def main(
    tokens: Annotated[list[int] | None, typer.Option(help="Default 197 133 69.")] = None,
    r: Annotated[int, typer.Option(min=1, help="Tokens merged.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 16,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="PyTorch's threads.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = OUT,
) -> None:
    """Print milliseconds of matching and merging beside those of the copies."""
    if threads is not None:
        torch.set_num_threads(threads)
    rows = [
        {"tokens": count} | _measured(count, r, batch, parse_dtype(dtype), rounds)
        for count in tokens or (197, 133, 69)
    ]

    def beside(name: str, copy: str | None) -> Callable[[Any], str]:
        if copy is None:
            return cell(name, "{:.2f}")
        return lambda row: f"{row[name]:.2f} ({row[name] / row[copy]:.1f}x)"

    def plot(axes: Any, rows: Any) -> None:
        labels = [f"{row['tokens']} tokens" for row in rows]
        bars(axes, labels, {name: [row[name] for row in rows] for name in COLUMNS})
        axes.set_ylabel("milliseconds")

    Results(
        name="kernels",
        title=f"Kernels: width {WIDTH}, r={r}, batch {batch}, {dtype}, ms (times the copy's)",
        columns={"tokens": cell("tokens")}
        | {name: beside(name, copy) for name, copy in COLUMNS.items()},
        rows=rows,
        settings={"width": WIDTH, "r": r, "batch": batch, "dtype": dtype, "rounds": rounds},
        plot=plot,
    ).publish(out)


def _measured(tokens: int, r: int, batch: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    keys = torch.randn(batch, tokens, HEADS, WIDTH // HEADS).to(dtype).transpose(1, 2)
    x = torch.randn(batch, tokens, WIDTH).to(dtype)
    size = torch.ones(batch, tokens)
    assign = match(keys, r, PROTECTED)

    def matching(keys: Tensor) -> Tensor:
        return match(keys, r, PROTECTED)  # type: ignore[no-any-return]

    def merging(x: Tensor, size: Tensor, assign: Tensor) -> Tensor:
        return merge(x, size, assign, tokens - r)  # type: ignore[no-any-return]

    torch.compiler.reset()
    compiled: list[Any] = [torch.compile(f, dynamic=False) for f in (matching, merging)]
    runs: list[Callable[[], Any]] = [
        lambda: keys.clone(),
        lambda: compiled[0](keys),
        lambda: match_cpu(keys, r, PROTECTED),
        lambda: x.clone(),
        lambda: compiled[1](x, size, assign),
        lambda: merge_cpu(x, size, assign, tokens - r),
    ]
    return dict(zip(COLUMNS, medians_in_turns(runs, rounds, calls=10), strict=True))


if __name__ == "__main__":
    app()
