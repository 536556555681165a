"""The exact ways to write proportional attention, one against the other.

    python -m benchmarks attention --tokens 197 181 165

Each takes queries, keys and values as a projection leaves them, and log(size) of each key, and is
compiled by Inductor for one shape. What wins on a device stands in ``tomepass/attention_paths.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.results import OUT, Results, cell, lines
from tomepass.cli.options import MultiValueCommand, parse_dtype
from tomepass.measuring.turns import medians_in_turns

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

HEADS, HEAD = 12, 64

TILE = 16

Way = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Queries, keys, values ``[B, H, N, D]`` and log sizes ``[B, N]`` to ``[B, H, N, D]``."""


def without_sizes(q: Tensor, k: Tensor, v: Tensor, log: Tensor) -> Tensor:
    """What it costs where nothing has merged: not exact after a merge."""
    return F.scaled_dot_product_attention(q, k, v)


def bias(q: Tensor, k: Tensor, v: Tensor, log: Tensor) -> Tensor:
    """log(size) broadcast as a bias of the fused kernel."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=log[:, None, None, :])


def padded_keys(q: Tensor, k: Tensor, v: Tensor, log: Tensor) -> Tensor:
    """The same, with keys up to the next multiple of a tile that weigh nothing."""
    missing = -k.shape[2] % TILE
    k, v = (F.pad(x, (0, 0, 0, missing)) for x in (k, v))
    log = F.pad(log, (0, missing), value=torch.finfo(log.dtype).min)
    return bias(q, k, v, log)


def extra_channel(q: Tensor, k: Tensor, v: Tensor, log: Tensor) -> Tensor:
    """log(size) as one more channel of the keys, its query the root of the head size."""
    root = HEAD**0.5
    q = F.pad(F.pad(q, (0, 1), value=root), (0, TILE - 1))
    k = F.pad(torch.cat([k, log[:, None, :, None].expand(*k.shape[:3], 1)], -1), (0, TILE - 1))
    attended = F.scaled_dot_product_attention(q, k, F.pad(v, (0, TILE)), scale=1 / root)
    return attended[..., :HEAD]


def scaled_values(q: Tensor, k: Tensor, v: Tensor, log: Tensor) -> Tensor:
    """Values times sizes, and the sizes themselves as a column that gives the denominator."""
    size = log.exp()[:, None, :, None]
    v = torch.cat([v * size, size.expand(*v.shape[:3], 1)], -1)
    q, k, v = (F.pad(x, (0, HEAD + TILE - x.shape[-1])) for x in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v, scale=HEAD**-0.5)
    return attended[..., :HEAD] / attended[..., HEAD : HEAD + 1]


def flex(q: Tensor, k: Tensor, v: Tensor, log: Tensor) -> Tensor:
    """FlexAttention, log(size) added to each score."""

    def weighed(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + log[b, j]

    attended: Tensor = flex_attention(q, k, v, score_mod=weighed)
    return attended


def written_out(q: Tensor, k: Tensor, v: Tensor, log: Tensor) -> Tensor:
    """Product, softmax with the bias in float32 or wider, product."""
    scores = (q * HEAD**-0.5) @ k.transpose(-1, -2)
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = (scores.to(wide) + log[:, None, None, :]).softmax(-1).to(q.dtype)
    return torch.matmul(weights, v)


PATHS: tuple[Way, ...] = (
    without_sizes,
    bias,
    padded_keys,
    extra_channel,
    scaled_values,
    flex,
    written_out,
)


@app.command(cls=MultiValueCommand)
def main(
    tokens: Annotated[
        list[int] | None, typer.Option(help="Default 197 181 165 133 101 69 37.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a call.")] = 16,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 11,
    threads: Annotated[int | None, typer.Option(min=1, help="PyTorch's threads.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = OUT,
) -> None:
    """Print milliseconds of each path at several token counts."""
    if threads is not None:
        torch.set_num_threads(threads)
    names = [path.__name__.replace("_", " ") for path in PATHS]
    rows = []
    for count in tokens or (197, 181, 165, 133, 101, 69, 37):
        figures = _measured(count, batch, parse_dtype(dtype), rounds)
        rows.append({"tokens": count} | dict(zip(names, figures, strict=True)))

    def plot(axes: Any, rows: Any) -> None:
        lines(axes, [row["tokens"] for row in rows], {n: [row[n] for row in rows] for n in names})
        axes.set_xlabel("tokens")
        axes.set_ylabel("milliseconds")

    Results(
        name="attention",
        title=f"Proportional attention: {HEADS} heads of {HEAD}, batch {batch}, {dtype}, ms",
        columns={"tokens": cell("tokens")} | {name: cell(name, "{:.2f}") for name in names},
        rows=rows,
        settings={"batch": batch, "dtype": dtype, "rounds": rounds},
        plot=plot,
    ).publish(out)


def inputs(tokens: int, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random operands, laid out as a projection leaves them."""
    q, k, v = (torch.randn(batch, tokens, HEADS, HEAD).to(dtype).transpose(1, 2) for _ in range(3))
    return q, k, v, torch.randint(1, 9, (batch, tokens)).log().to(dtype)


def _measured(tokens: int, batch: int, dtype: torch.dtype, rounds: int) -> list[float]:
    operands = inputs(tokens, batch, dtype)
    torch.compiler.reset()
    compiled: list[Any] = [torch.compile(path, dynamic=False) for path in PATHS]
    runs = [functools.partial(path, *operands) for path in compiled]
    return medians_in_turns(runs, rounds, calls=8)


if __name__ == "__main__":
    app()
