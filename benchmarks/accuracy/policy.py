"""Learned policies against pruning that learns nothing, on the digits model.

    python -m benchmarks policy --blocks 0 2 4 --rate 0.3 --epochs 10

Policies are trained on the digits the model was trained on, distorted as then, without labels;
accuracy and the divergence from the unreduced model are those of the held-out ones. Random pruning,
the same tokens in every image, and the trained policies are told by the mean over several seeds.
What a policy draws before it is trained is told too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.train_digits import augment, load_split
from benchmarks.results import OUT, Results, bars, cell
from tomepass import apply, digits, train_policy
from tomepass.cli.options import MultiValueCommand
from tomepass.methods import AdaViT, DynamicViT, Method, Policy, Prune

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

SEEDS = 5


class Quality(NamedTuple):
    """Accuracy in percent, divergence from the unreduced model, tokens in use after blocks."""

    accuracy: float
    kl: float
    kept: list[float]


COLUMNS: dict[str, Callable[[Any], str]] = {
    "method": cell("method"),
    "top-1 %": cell("accuracy", "{:.1f}"),
    "KL": cell("KL", "{:.3f}"),
    "least to greatest": lambda row: f"{row['least KL']:.3f}-{row['greatest KL']:.3f}",
    "tokens in use": lambda row: ", ".join(f"{kept:.1f}" for kept in row["kept"]),
    "training, s": cell("seconds of training", "{:.0f}"),
}


@app.command(cls=MultiValueCommand)
def main(
    rate: Annotated[float, typer.Option(help="Of the tokens, kept in each of the blocks.")] = 0.3,
    blocks: Annotated[list[int] | None, typer.Option(help="That reduce; default 0 2 4.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training digits.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="At the start.")] = 3e-3,
    trainings: Annotated[int, typer.Option(min=1, help="Of each policy, by other seeds.")] = 1,
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
    # Distorted as for the model, which knows them by heart as they are: no policy costs it much.
    order = torch.randperm(len(seen))
    batches = [augment(seen[rows]) for rows in torch.split(order, batch)]

    training = {"epochs": epochs, "learning_rate": learning_rate}
    made = _methods(model, given, batches, trainings, training)
    rows = [
        _row(name, make, lambda method: _quality(model, method, places, pixels, labels))
        for name, make in made.items()
    ]
    Results(
        name="policy",
        title=f"Digits, {rate:g} of the tokens kept in blocks {', '.join(map(str, places))}",
        columns=COLUMNS,
        rows=rows,
        settings=given
        | {"epochs": epochs, "batch": batch, "learning_rate": learning_rate}
        | {"trainings": trainings},
        plot=_plot,
    ).publish(out)


def _methods(
    model: nn.Module, given: Any, batches: Sequence[Tensor], trainings: int, training: Any
) -> dict[str, Callable[[], list[Method]]]:
    """What makes the methods of each row, some of them by training."""

    def trained(kind: Callable[..., Any]) -> list[Method]:
        seeds = range(trainings)
        return [train_policy(model, kind(**given), batches, seed=s, **training) for s in seeds]

    return {
        "random": lambda: [Prune(score="random", seed=s, **given) for s in range(SEEDS)],
        "class attention": lambda: [Prune(**given)],
        "draw alone": lambda: [DynamicViT(policy=_untrained(model, given["blocks"]), **given)],
        "DynamicViT": lambda: trained(DynamicViT),
        "AdaViT": lambda: trained(AdaViT),
    }


def _row(
    name: str, make: Callable[[], list[Method]], quality_of: Callable[[Method], Quality]
) -> dict[str, Any]:
    """The mean over methods that differ in their seeds, and what making one took."""
    start = time.perf_counter()
    methods = make()
    seconds = (time.perf_counter() - start) / len(methods)
    found = [quality_of(method) for method in methods]
    kl = [quality.kl for quality in found]
    return {
        "method": name,
        "accuracy": mean(quality.accuracy for quality in found),
        "KL": mean(kl),
        "least KL": min(kl),
        "greatest KL": max(kl),
        "kept": [mean(k) for k in zip(*(quality.kept for quality in found), strict=True)],
        "seconds of training": seconds,
    }


def _plot(axes: Any, rows: Any) -> None:
    bars(axes, [row["method"] for row in rows], {"divergence": [row["KL"] for row in rows]})
    axes.set_ylabel("KL from the unreduced model")


def _untrained(model: nn.Module, places: tuple[int, ...]) -> Policy:
    """What training starts from: all tokens score alike, and the draw alone decides."""
    generator = torch.Generator().manual_seed(0)
    width = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    return Policy({place: DynamicViT().initial(width, 0.0, generator) for place in places})


@torch.no_grad()
def _quality(
    model: nn.Module, method: Method, places: tuple[int, ...], pixels: Tensor, labels: Tensor
) -> Quality:
    merged = apply(model, method)
    reduced, whole = (m(pixels).logits for m in (merged, model))
    logs = (reduced.log_softmax(-1), whole.log_softmax(-1))
    kl = F.kl_div(*logs, log_target=True, reduction="batchmean")
    right = 100 * float((reduced.argmax(-1) == labels).float().mean())
    kept = merged.tome.kept(pixels)[:, list(places)].float().mean(0)
    return Quality(right, float(kl), kept.tolist())


if __name__ == "__main__":
    app()
