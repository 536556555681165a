"""Every method at equal multiply-accumulates: how far from the unmerged model, and how fast.

    python -m benchmarks accuracy --model DIR --images DIR --methods all --macs 0.85 0.7 0.6 0.5

Calibrated methods are tuned on images that are reported on by none. A run that was broken off goes
on where it stopped, as long as ``--out`` and ``--name`` are the same, and one with ``--no-speed``
is completed by one with speeds. For these every row is compiled: a minute or two with Inductor,
less with OpenVINO (``--backend openvino``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import nn

import tomepass
from benchmarks.results import OUT, Results, cell
from tomepass import (
    ATS,
    MLERP,
    DiffRate,
    EViT,
    Method,
    PiToMe,
    Prune,
    SPViT,
    Threshold,
    ToFu,
    ToMe,
)
from tomepass.calibration.judging import Judge
from tomepass.calibration.shapes import filled
from tomepass.errors import TomeError
from tomepass.measuring.environment import environment
from tomepass.measuring.measure import measure
from tomepass.methods import method_from_dict
from tomepass.planning.solving import even
from tomepass.printing.plots import GRID, INK, SERIES
from tomepass.printing.style import progress_bar
from tomepass.sources.files import write_whole
from tomepass.sources.images import ImageSet, load_images
from tomepass.sources.models import load_model

METHODS: dict[str, Method] = {
    "ToMe": ToMe(),
    "ToMe, class attention": ToMe(importance="class_attention"),
    "ToMe, all heads": ToMe(importance="class_attention", metric="keys_all_heads"),
    "PiToMe": PiToMe(),
    "ToFu, halves": ToFu(),
    "DiffRate, half pruned": DiffRate(),
    "EViT": EViT(),
    "SPViT": SPViT(),
    "ATS": ATS(),
    "Threshold, 0.9": Threshold(),
    "Prune, class attention": Prune(),
    "Prune, random": Prune(score="random"),
}


CALIBRATED: dict[str, Method] = {
    "ToMe, calibrated": ToMe(importance="class_attention"),
    "ToFu, calibrated": ToFu(),
    "DiffRate, calibrated": DiffRate(),
}


ABLATIONS: dict[str, Method] = {
    "as in the paper": ToMe(),
    "metric: queries": ToMe(metric="queries"),
    "metric: values": ToMe(metric="values"),
    "metric: hidden": ToMe(metric="hidden"),
    "metric: keys, all heads": ToMe(metric="keys_all_heads"),
    "similarity: euclidean": ToMe(similarity="euclidean"),
    "similarity: dot": ToMe(similarity="dot"),
    "similarity: softmax": ToMe(similarity="softmax"),
    "combine: MLERP, max": ToMe(combine=MLERP("max")),
    "combine: MLERP, mean": ToMe(combine=MLERP("mean")),
    "combine: mean": ToMe(combine="mean"),
    "combine: max": ToMe(combine="max"),
    "combine: keep": ToMe(combine="keep"),
    "partition: random": ToMe(partition="random"),
    "partition: sequential": ToMe(partition="sequential"),
    "partition: every 4th": ToMe(partition="kth", k=4),
    "matching: greedy": ToMe(matching="greedy"),
    "matching: k-means, 2": ToMe(matching="kmeans"),
    "matching: k-means, 5": ToMe(matching="kmeans", iterations=5),
    "importance: class attention": ToMe(importance="class_attention"),
    "prune: class attention": Prune(),
    "prune: random": Prune(score="random"),
    "prop. attention off": ToMe(prop_attn=False),
}


WITHIN = 0.01
"""Of the unmerged multiply-accumulates: how far below what was asked for a method may be."""


_GROUPS = {"all": {**METHODS, **CALIBRATED}, "ablations": ABLATIONS}


COLUMNS: dict[str, Callable[[Any], str]] = {
    "method": cell("method"),
    "MACs": cell("macs", "{:.1%}"),
    "KL": cell("KL", "{:.4f}"),
    "agreement": cell("agreement", "{:.1%}"),
    "top-1": lambda row: "" if row["top-1"] is None else f"{row['top-1']:.1%}",
}


SPEEDS: dict[str, Callable[[Any], str]] = {
    "images/s": cell("images/s", "{:.1f}"),
    "speed-up": lambda r: f"{r['speed-up']:.2f}x ({r['least']:.2f}-{r['greatest']:.2f})",
    "ideal": lambda row: f"{1 / row['macs']:.2f}x",
}


def main(
    model: Annotated[str | None, typer.Option(help="A model directory. Default: digits.")] = None,
    images: Annotated[Path | None, typer.Option(help="A folder of images.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Their labels, as in tomepass demo.")] = None,
    methods: Annotated[
        list[str] | None, typer.Option(help="Names; 'all' or 'ablations'. Default all.")
    ] = None,
    macs: Annotated[
        list[float] | None, typer.Option(help="Shares to keep. Default 0.85 0.7 0.6 0.5.")
    ] = None,
    tuned: Annotated[int, typer.Option(min=4, help="Images that calibration may see.")] = 128,
    speed: Annotated[bool, typer.Option(help="Measure compiled images a second.")] = True,
    batch: Annotated[int, typer.Option(min=1, help="Images a call when timing.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved samples of each form.")] = 5,
    backend: Annotated[str, typer.Option(help="What compiles both forms.")] = "inductor",
    threads: Annotated[int | None, typer.Option(min=1, help="torch.set_num_threads.")] = None,
    name: Annotated[str, typer.Option(help="Of the files.")] = "accuracy",
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = OUT,
) -> None:
    """Print divergence, agreement, top-1 and speed of each method at equal MACs."""
    if threads is not None:
        torch.set_num_threads(threads)
    subject, data, label = load(model, images, labels)
    mine, others = split(data, tuned)
    run = _Run(subject, data, mine, others, batch, rounds, backend, out / f"{name}.cache")
    out.mkdir(parents=True, exist_ok=True)
    rows = _rows(run, _chosen(methods or ["all"]), macs or (0.85, 0.7, 0.6, 0.5), speed)
    settings = {"model": label, "images": len(others), "tuned": len(mine), "batch": batch}
    Results(
        name=name,
        title=f"{label}, {len(others)} images, nothing trained",
        columns=COLUMNS | SPEEDS if speed else COLUMNS,
        rows=rows,
        settings=settings | {"rounds": rounds, "backend": backend},
        plot=_plot if speed else _plot_divergence,
    ).publish(out)


def _rows(
    run: _Run, methods: Mapping[str, Method], macs: Sequence[float], speed: bool
) -> list[Any]:
    """A row a method and share of the MACs; those that cannot be had are said and left out."""
    rows = []
    with progress_bar() as bar:
        task = bar.add_task("", total=None)
        for what, method in methods.items():
            for share in macs:
                bar.update(task, description=f"{what} at {share:.0%} of the MACs")
                try:
                    rows.append(run.row(what, method, share, speed))
                except TomeError as error:
                    bar.console.print(f"left out: {error.reason}")
    if not rows:
        raise TomeError("nothing to report: no method reaches what was asked for")
    return _on_one_scale(rows) if speed else rows


def load(
    model: str | None, images: Path | None, labels: Path | None
) -> tuple[nn.Module, ImageSet, str]:
    """A model, its images, and what to call it: the embedded digits where none is named."""
    if model is None:
        from tomepass import digits

        pixels, classes = digits.load_images()
        names = tuple(f"digit {int(c)}" for c in classes)
        return digits.load_model(), ImageSet(pixels, classes, names), "digits"
    if images is None:
        raise TomeError("--model and --images belong together: give both or neither")
    subject = load_model(model)
    found = images / "labels.tsv"
    labels = labels or (found if found.exists() else None)
    return subject, load_images(subject, model, images, labels), Path(model).name


def split(data: ImageSet, tuned: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which images calibration may see, half of them at most, and which are reported on."""
    order = torch.randperm(len(data.names), generator=torch.Generator().manual_seed(0))
    tuned = min(tuned, len(order) // 2)
    return order[:tuned], order[tuned:]


def _chosen(names: Sequence[str]) -> dict[str, Method]:
    every = {name: method for group in _GROUPS.values() for name, method in group.items()}
    chosen: dict[str, Method] = {}
    for name in names:
        if name not in _GROUPS and name not in every:
            known = ", ".join([*_GROUPS, *every])
            raise TomeError(f"no method {name!r}; known: {known}")
        chosen |= _GROUPS.get(name) or {name: every[name]}
    return chosen


@dataclass(frozen=True)
class _Run:
    """A model, the images it is tuned and judged on, and a file of what is known already."""

    model: nn.Module
    data: ImageSet
    tuned: torch.Tensor
    seen: torch.Tensor
    batch: int
    rounds: int
    backend: str
    cache: Path

    @cached_property
    def judge(self) -> Judge:
        """Of the images that are reported on."""
        labels = None if self.data.labels is None else self.data.labels[self.seen]
        return Judge(self.model, torch.split(self.data.pixel_values[self.seen], 64), labels)

    @cached_property
    def subject(self) -> str:
        """Of the weights and images: what is known of others says nothing of these."""
        found = hashlib.sha256(repr((self.tuned.tolist(), self.seen.tolist())).encode())
        for tensor in (*self.model.state_dict().values(), self.data.pixel_values):
            found.update(tensor.contiguous().numpy())
        return found.hexdigest()[:12]

    def row(self, name: str, method: Method, macs: float, speed: bool) -> dict[str, Any]:
        """What one method does at one share of the MACs."""
        row: dict[str, Any] = self._known(
            f"{name}|{macs}", lambda: self._scores(name, method, macs)
        )
        if not speed:
            return row
        exactly = method_from_dict(row["exactly"])
        how = (self.backend, self.batch, environment()["cpu"], torch.get_num_threads())
        key = "|".join(map(str, (name, macs, *how)))
        return {**row, **self._known(key, lambda: self._speed(exactly))}

    def _known(self, key: str, find: Callable[[], Any]) -> Any:
        """What the file says, else what ``find`` returns, which is written down."""
        known = json.loads(self.cache.read_text()) if self.cache.exists() else {}
        key = f"{self.subject}|{key}"
        if key not in known:
            known[key] = find()
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.cache, json.dumps(known, indent=1))
        return known[key]

    def _scores(self, name: str, method: Method, macs: float) -> dict[str, Any]:
        judge = self.judge
        if name in CALIBRATED:
            method = tomepass.calibrate(
                self.model,
                torch.split(self.data.pixel_values[self.tuned], 64),
                macs=macs,
                methods=method,
                cache=self.cache.with_suffix(".calibration"),
                progress=False,
            ).method
        else:
            method = even(method, macs, judge.share, judge.costs.tokens, judge.depth)
            if judge.share(method) < macs - WITHIN:
                method = filled(method, macs, judge.share)
        score = judge.score(method)
        return {
            "method": name,
            "asked": macs,
            "macs": judge.share(method),
            "KL": score.divergence,
            "agreement": score.agreement,
            "top-1": score.top1,
            "exactly": method.to_dict(),
        }

    def _speed(self, method: Method) -> dict[str, float]:
        inputs = self.data.pixel_values[: self.batch]
        found = measure(self.model, inputs, method, inner=self.backend, rounds=self.rounds)
        return {
            "unmerged images/s": found.original.images_per_second,
            "speed-up": found.ratio.median,
            "least": found.ratio.low,
            "greatest": found.ratio.high,
        }


def _on_one_scale(rows: Sequence[Any]) -> list[Any]:
    """With images a second at one rate of the unmerged model, as machines drift between rows."""
    unmerged = median(row["unmerged images/s"] for row in rows)
    return [row | {"images/s": unmerged * row["speed-up"]} for row in rows]


def _plot(axes: Any, rows: Sequence[Any]) -> None:
    names = list(dict.fromkeys(row["method"] for row in rows))
    what = "agreement" if rows[0]["top-1"] is None else "top-1"
    for index, name in enumerate(names):
        mine = [row for row in rows if row["method"] == name]
        axes.plot(
            [row["images/s"] for row in mine],
            [100 * row[what] for row in mine],
            color=SERIES[index % len(SERIES)],
            linestyle=("-", "--", ":")[index // len(SERIES)],
            marker="o",
            markersize=4,
            linewidth=1.6,
            label=name,
        )
    axes.set_xlabel("compiled images per second")
    axes.set_ylabel(f"{what} (%)")
    axes.figure.legend(loc="outside right upper", frameon=False, labelcolor=INK, fontsize=8.5)


def _plot_divergence(axes: Any, rows: Sequence[Any]) -> None:
    names = list(dict.fromkeys(row["method"] for row in rows))
    shares = list(dict.fromkeys(row["asked"] for row in rows))
    height = 0.8 / len(shares)
    for index, share in enumerate(shares):
        mine = {row["method"]: row["KL"] for row in rows if row["asked"] == share}
        places = [i + (index - (len(shares) - 1) / 2) * height for i in range(len(names))]
        values = [mine.get(name, 0.0) for name in names]
        axes.barh(places, values, 0.9 * height, color=SERIES[index], label=f"{share:.0%} of MACs")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.grid(False)
    axes.grid(axis="x", color=GRID, linewidth=0.9)
    axes.set_xlabel("KL(unmerged || reduced)")
    axes.figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=INK)
