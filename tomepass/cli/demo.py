"""``tomepass demo``: the whole story on one model, with pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tomepass.errors import TomeError
from tomepass.methods import ToMe
from tomepass.sources.images import ImageSet

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from tomepass.measuring.values import Measurement


DIGITS_R = (4, 6, 8)

DEFAULT_R = (8, 13, 16)

EVALUATION_BATCH = 50

PICTURED = 4


@dataclass(frozen=True)
class DemoRow:
    """One r: accuracy and agreement in percent (None without labels), images per second."""

    r: int
    tokens: str
    accuracy: float | None
    agreement: float
    images_per_second: float
    speedup: float
    speedup_ideal: float


def run_demo(
    console: Console,
    model_name: str | None = None,
    images: Path | None = None,
    labels: Path | None = None,
    r: Sequence[int] | None = None,
    out: Path = Path("tomepass-demo"),
    batch: int = 64,
    rounds: int = 10,
    limit: int | None = None,
) -> list[DemoRow]:
    """Explains, checks and measures a model at a few r; writes a picture and a plot to ``out``.

    Without a model and images, the embedded digits model and its held-out images are used.
    """
    from tomepass.handover.compiling.inner import default_inner
    from tomepass.printing.plots import accuracy_plot

    if (model_name is None) != (images is None):
        raise TomeError("--model and --images belong together: give both or neither")
    values = list(r or (DIGITS_R if model_name is None else DEFAULT_R))
    inner = default_inner()
    label = "digits" if model_name is None else Path(model_name).name
    # Loading, explaining, six lines of checks, two steps an r, drawing.
    with _steps(console, 10 + 2 * len(values)) as step:
        model, data = _load(model_name, images, labels, limit, step)
        step("capturing and planning")
        console.print(_explain(model, data, values[-1]))
        console.print(_check(model, data, values[-1], inner, step))
        rows = _rows(model, data, values, (inner, batch, rounds), step)
        step("drawing")
        out.mkdir(parents=True, exist_ok=True)
        picture = _picture(model, data, values, out / "merged_tokens.png")
        plot = out / "accuracy_speed.png"
        accuracy_plot(rows, plot, f"{label}, {inner}, batch {batch}")
    console.print(_table(rows, f"{label}, {inner}, batch {batch}"))
    if inner == "eager":
        console.print(
            "No C++ compiler was found, which Inductor needs on a CPU: the figures above are eager "
            "ones. Install g++ to see compiled speeds."
        )
    if picture is not None:
        console.print(f"picture: {picture}")
    console.print(f"plot: {plot}")
    return rows


@contextmanager
def _steps(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A bar with a text, which is told what is done next."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("loading", total=total)
        yield lambda text: progress.update(task, description=text, advance=1)


def _rows(
    model: nn.Module,
    data: ImageSet,
    values: Sequence[int],
    timing: tuple[str, int, int],
    step: Callable[[str], None],
) -> list[DemoRow]:
    """A row for the unmerged model, and one a value of r; ``timing``: backend, batch, rounds."""
    original = _evaluate(model, data.pixel_values)
    rows = [_row(model, data, 0, original)]
    measurements = []
    for value in values:
        step(f"r={value}: classifying {len(data.names)} images")
        rows.append(_row(model, data, value, original))
        step(f"r={value}: compiling and measuring")
        measurements.append(_measure(model, data, value, *timing))
    return _timed(rows, measurements)


def _load(
    name: str | None, images: Path | None, labels: Path | None, limit: int | None, step: Any
) -> tuple[nn.Module, ImageSet]:
    if name is None:
        from tomepass import digits

        pixels, classes = digits.load_images()
        names = tuple(f"digit {int(c)}" for c in classes)
        return digits.load_model(), ImageSet(pixels[:limit], classes[:limit], names[:limit])
    assert images is not None
    from tomepass.sources.images import load_images
    from tomepass.sources.models import load_model

    model = load_model(name)
    step("reading images")
    return model, load_images(model, name, images, labels, limit)


def _explain(model: nn.Module, data: ImageSet, r: int) -> Any:
    from tomepass.handover.applying import explain

    report = explain(model, r=r, example_inputs=data.pixel_values[:2])
    if not report.ok:
        raise report.refusal()
    return report


def _check(model: nn.Module, data: ImageSet, r: int, inner: str, step: Any) -> Any:
    from tomepass.proof.check import check

    return check(
        model,
        data.pixel_values[:8],
        r=r,
        inner=inner,
        progress=lambda name: step(f"checking: {name}"),
    )


def _evaluate(model: nn.Module, pixels: Tensor) -> Tensor:
    """The first output for all images: ``[B, classes]`` logits, or features."""
    import torch

    with torch.no_grad():
        starts = range(0, len(pixels), EVALUATION_BATCH)
        parts = [_first(model(pixels[i : i + EVALUATION_BATCH])) for i in starts]
    return torch.cat(parts)


def _first(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = getattr(output, "pooler_output", None)
    return output[0] if logits is None else logits  # type: ignore[no-any-return]


def _row(model: nn.Module, data: ImageSet, r: int, original: Tensor) -> DemoRow:
    from tomepass.handover.applying import apply

    merged = apply(model, r=r, example_inputs=data.pixel_values[:2])
    outputs = _evaluate(merged, data.pixel_values)
    report = merged.tome.report(data.pixel_values[:2])
    first, last = report.blocks[0].tokens_in, report.blocks[-1].tokens_out
    tokens = f"{first} -> {last}" if last < first else str(first)
    agreement = _percent(outputs.argmax(-1) == original.argmax(-1))
    return DemoRow(r, tokens, _accuracy(outputs, data), agreement, 0.0, 0.0, report.speedup_ideal)


def _measure(
    model: nn.Module, data: ImageSet, r: int, inner: str, batch: int, rounds: int
) -> Measurement:
    from tomepass.measuring.measure import measure

    pixels = data.pixel_values
    repeats = -(-batch // len(pixels))
    inputs = pixels.repeat(repeats, 1, 1, 1)[:batch]
    return measure(model, inputs, ToMe(r=r), inner=inner, rounds=rounds)


def _timed(rows: Sequence[DemoRow], measurements: Sequence[Measurement]) -> list[DemoRow]:
    """Rates of all rows on one scale: the unmerged rate times each interleaved ratio.

    Rates of separate runs do not compare: a shared machine changes its speed in between.
    """
    rates = sorted(m.original.images_per_second for m in measurements)
    unmerged = rates[len(rates) // 2]
    ratios = [1.0, *(m.ratio.median for m in measurements)]
    return [
        dataclasses.replace(row, images_per_second=unmerged * ratio, speedup=ratio)
        for row, ratio in zip(rows, ratios, strict=True)
    ]


def _accuracy(outputs: Tensor, data: ImageSet) -> float | None:
    return None if data.labels is None else _percent(outputs.argmax(-1) == data.labels)


def _percent(hits: Tensor) -> float:
    return 100.0 * float(hits.float().mean())


def _table(rows: Sequence[DemoRow], title: str) -> Any:
    from tomepass.printing.style import table

    made = table(
        title,
        "r",
        "tokens",
        "top-1 %",
        "agree %",
        "images/s",
        "speed-up",
        "ideal",
        caption="images/s: the unmerged rate times the speed-up, the median ratio of "
        "interleaved rounds; ideal: by multiply-accumulates alone",
    )
    for row in rows:
        made.add_row(
            str(row.r) if row.r else "unmerged",
            row.tokens,
            "-" if row.accuracy is None else f"{row.accuracy:.1f}",
            f"{row.agreement:.1f}",
            f"{row.images_per_second:.0f}",
            f"{row.speedup:.2f}x",
            f"{row.speedup_ideal:.2f}x",
        )
    return made


def _picture(model: nn.Module, data: ImageSet, values: Sequence[int], path: Path) -> Path | None:
    """Sources of a few images at each r; None for a model whose tokens form no grid."""
    from tomepass.handover.applying import apply
    from tomepass.printing.pictures import patch_grid, save_merged_picture

    chosen = _spread(len(data.names))
    pixels = data.pixel_values[chosen]
    sources = []
    protected: tuple[int, ...] = ()
    for value in values:
        merged = apply(model, ToMe(r=value, trace_source=True), example_inputs=pixels)
        protected = merged.tome.report(pixels).protected
        sources.append((value, merged.tome.source(pixels)))
    patches = sources[0][1].shape[1] - len(protected)
    if pixels.ndim != 4 or patch_grid(patches, pixels.shape[2], pixels.shape[3]) is None:
        return None
    captions = [Path(data.names[i]).stem[:24] for i in chosen]
    save_merged_picture(pixels, sources, protected, path, captions)
    return path


def _spread(count: int) -> list[int]:
    """A few indices spread over the images: folders are often sorted by class."""
    shown = min(PICTURED, count)
    return [i * count // shown for i in range(shown)]
