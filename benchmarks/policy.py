"""Learned policies against pruning that learns nothing, on the digits model.

    python -m benchmarks policy --blocks 0 2 4 --rate 0.3 --epochs 10

Policies are trained on the digits the model was trained on, without labels; accuracy and the
divergence from the unreduced model are those of the held-out ones. Random pruning is told by the
mean over several seeds, each the same tokens in every image.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.results import OUT, Results, bars, cell
from benchmarks.train_digits import load_split
from tomepass import apply, digits, train_policy
from tomepass.methods import AdaViT, DynamicViT, Method, Prune
from tomepass.options import MultiValueCommand

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
SEEDS = 5


@app.command(cls=MultiValueCommand)
def main(
    rate: Annotated[float, typer.Option(help="Of the tokens, kept in each of the blocks.")] = 0.3,
    blocks: Annotated[list[int] | None, typer.Option(help="That reduce; default 0 2 4.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training digits.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="At the start.")] = 3e-3,
    threads: Annotated[int | None, typer.Option(min=1, help="PyTorch's threads.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = OUT,
) -> None:
    """Print accuracy and divergence of trained policies and of pruning without one."""
    if threads is not None:
        torch.set_num_threads(threads)
    places = tuple(blocks or (0, 2, 4))
    model, (pixels, labels) = digits.load_model(), digits.load_images()
    given: dict[str, Any] = {"keep_rate": rate, "blocks": places}
    torch.manual_seed(0)
    seen = digits.upscale(load_split()[0].images)
    batches = [seen[rows] for rows in torch.split(torch.randperm(len(seen)), batch)]

    def trained(method: Any) -> tuple[Method, float]:
        start = time.perf_counter()
        options: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate}
        return train_policy(model, method, batches, **options), time.perf_counter() - start

    made: dict[str, Callable[[], tuple[list[Method], float]]] = {
        "random": lambda: ([Prune(score="random", seed=s, **given) for s in range(SEEDS)], 0.0),
        "class attention": lambda: ([Prune(**given)], 0.0),
        "DynamicViT": lambda: _alone(*trained(DynamicViT(**given))),
        "AdaViT": lambda: _alone(*trained(AdaViT(**given))),
    }
    rows = []
    for name, make in made.items():
        methods, seconds = make()
        found = [_quality(model, method, pixels, labels) for method in methods]
        hits, kl = zip(*found, strict=True)
        rows.append(
            {"method": name, "accuracy": _mean(hits), "KL": _mean(kl)}
            | {"least KL": min(kl), "greatest KL": max(kl), "seconds of training": seconds}
        )

    def plot(axes: Any, rows: Any) -> None:
        bars(axes, [row["method"] for row in rows], {"divergence": [row["KL"] for row in rows]})
        axes.set_ylabel("KL from the unreduced model")

    Results(
        name="policy",
        title=f"Digits, {rate:g} of the tokens kept in blocks {', '.join(map(str, places))}",
        columns={
            "method": cell("method"),
            "top-1 %": cell("accuracy", "{:.1f}"),
            "KL": cell("KL", "{:.3f}"),
            "least to greatest": lambda row: f"{row['least KL']:.3f}-{row['greatest KL']:.3f}",
            "training, s": cell("seconds of training", "{:.0f}"),
        },
        rows=rows,
        settings=given | {"epochs": epochs, "batch": batch, "learning_rate": learning_rate},
        plot=plot,
    ).publish(out)


def _alone(method: Method, seconds: float) -> tuple[list[Method], float]:
    return [method], seconds


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def _quality(
    model: nn.Module, method: Method, pixels: Tensor, labels: Tensor
) -> tuple[float, float]:
    """Accuracy in percent, and the divergence from the unreduced model's classes."""
    reduced, whole = (m(pixels).logits for m in (apply(model, method), model))
    logs = (reduced.log_softmax(-1), whole.log_softmax(-1))
    kl = F.kl_div(*logs, log_target=True, reduction="batchmean")
    return 100 * float((reduced.argmax(-1) == labels).float().mean()), float(kl)


if __name__ == "__main__":
    app()
