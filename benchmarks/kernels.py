"""Matching and merging alone, against a plain copy of the bytes they cannot avoid.

    python -m benchmarks kernels --tokens 197 133 69

Each is compiled by Inductor for one shape. Matching must read the keys, merging must read and
write the tokens; a copy of as many bytes is what the memory allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.turns import medians_in_turns, show
from tomepass.loading import parse_dtype
from tomepass.ops.match import match
from tomepass.ops.merge import merge
from tomepass.options import MultiValueCommand
from tomepass.tables import table

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
WIDTH, HEADS, PROTECTED = 768, 12, [0]


@app.command(cls=MultiValueCommand)
def main(
    tokens: Annotated[list[int] | None, typer.Option(help="Default 197 133 69.")] = None,
    r: Annotated[int, typer.Option(min=1, help="Tokens merged.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 16,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="PyTorch's threads.")] = None,
) -> None:
    """Print milliseconds of matching and merging beside those of the copies."""
    if threads is not None:
        torch.set_num_threads(threads)
    title = f"width {WIDTH}, r={r}, batch {batch}, {dtype}: milliseconds (times the copy's)"
    shown = table(title, "tokens", "copy of the keys", "matching", "copy of tokens", "merging")
    for count in tokens or (197, 133, 69):
        shown.add_row(str(count), *_measured(count, r, batch, parse_dtype(dtype), rounds))
    show(shown)


def _measured(tokens: int, r: int, batch: int, dtype: torch.dtype, rounds: int) -> list[str]:
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
        lambda: x.clone(),
        lambda: compiled[1](x, size, assign),
    ]
    first, matched, second, merged = medians_in_turns(runs, rounds, calls=10)
    return [
        f"{first:.2f}",
        f"{matched:.2f} ({matched / first:.1f})",
        f"{second:.2f}",
        f"{merged:.2f} ({merged / second:.1f})",
    ]


if __name__ == "__main__":
    app()
