"""What a budget for each image gains over one for all, at the same mean multiply-accumulates.

    python -m benchmarks adaptive --model DIR --images DIR --r 8 13 16

Thresholds are measured on images that are not reported on. Both forms and the unmerged model are
compiled by Inductor with dynamic batches, and timed in turns on the same images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import tomepass
from benchmarks.accuracy.accuracy import load, split
from benchmarks.results import OUT, Results, bars, cell
from tomepass import Method, ToMe
from tomepass.calibration.judging import Judge
from tomepass.cli.options import parse_r
from tomepass.handover.adaptive import AdaptiveModel
from tomepass.measuring.turns import medians_in_turns
from tomepass.planning.solving import even

_FORMS = ("unmerged", "one budget", "adaptive")


def main(
    model: Annotated[str | None, typer.Option(help="A model directory. Default: digits.")] = None,
    images: Annotated[Path | None, typer.Option(help="A folder of images.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Their labels, as in tomepass demo.")] = None,
    r: Annotated[list[str] | None, typer.Option(help="Default 8 13 16.")] = None,
    tuned: Annotated[int, typer.Option(min=4, help="Images that thresholds may see.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Images a call when timing.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="torch.set_num_threads.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = OUT,
) -> None:
    """Print divergence and speed of adaptive and plain ToMe at equal mean MACs."""
    if threads is not None:
        torch.set_num_threads(threads)
    subject, data, label = load(model, images, labels)
    mine, others = split(data, tuned)
    seen = data.pixel_values[others]
    judge = Judge(subject, torch.split(seen, 64))
    rows = []
    for text in r or ("8", "13", "16"):
        method = ToMe(parse_r(text), adaptive=True)
        adaptive = tomepass.apply(subject, method, example_inputs=data.pixel_values[mine])
        assert isinstance(adaptive, AdaptiveModel)
        rows.append({"r": text} | _compared(subject, judge, adaptive, seen, batch, rounds))
    Results(
        name="adaptive",
        title=f"{label}, {len(seen)} images, adaptive against one budget at equal mean MACs",
        columns={
            "r": cell("r"),
            "mean MACs": cell("macs", "{:.1%}"),
            "KL, one budget": cell("KL, one budget", "{:.4f}"),
            "KL, adaptive": cell("KL, adaptive", "{:.4f}"),
            "images a budget": lambda row: "/".join(map(str, row["images a budget"])),
            **{f"{form}, images/s": cell(form, "{:.1f}") for form in _FORMS},
        },
        rows=rows,
        settings={"model": label, "images": len(seen), "tuned": len(mine), "batch": batch},
        plot=_plot,
    ).publish(out)


def _compared(
    model: nn.Module, judge: Judge, adaptive: AdaptiveModel, seen: Tensor, batch: int, rounds: int
) -> dict[str, Any]:
    routes = torch.cat([adaptive.tome.routes(part) for part in torch.split(seen, 64)])
    counted = torch.bincount(routes, minlength=len(adaptive.tome.budgets)).tolist()
    outputs = [judge.outputs(budget.tome.method).divergence for budget in adaptive.tome.budgets]
    divergence = torch.stack(outputs).gather(0, routes[None])[0].mean()
    shares = [judge.share(budget.tome.method) for budget in adaptive.tome.budgets]
    macs = sum(n * share for n, share in zip(counted, shares, strict=True)) / len(seen)
    plain = even(ToMe(), macs, judge.share, judge.costs.tokens, judge.depth)
    return {
        "macs": macs,
        "KL, one budget": judge.score(plain).divergence,
        "KL, adaptive": float(divergence),
        "images a budget": counted,
    } | _rates(model, plain, adaptive, seen[:batch], rounds)


@torch.no_grad()
def _rates(
    model: nn.Module, plain: Method, adaptive: AdaptiveModel, x: Tensor, rounds: int
) -> dict[str, float]:
    torch._dynamo.reset()
    fixed = tomepass.apply(model, plain, example_inputs=x)
    forms = [torch.compile(form, dynamic=True) for form in (model, fixed)]
    adaptive.compile()

    def ran(form: Any) -> Callable[[], Any]:
        return lambda: form(x)

    ways = [ran(form) for form in (*forms, adaptive)]
    milliseconds = medians_in_turns(ways, rounds, 1)
    return {form: 1000 * len(x) / t for form, t in zip(_FORMS, milliseconds, strict=True)}


def _plot(axes: Any, rows: Any) -> None:
    series = {name: [row[f"KL, {name}"] for row in rows] for name in ("one budget", "adaptive")}
    bars(axes, [f"r={row['r']}" for row in rows], series)
    axes.set_ylabel("KL(unmerged || merged) at equal mean MACs")
