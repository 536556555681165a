"""What a benchmark leaves behind: a table on screen; JSON, Markdown and a plot in a folder."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tomepass.measuring.environment import describe, environment
from tomepass.measuring.values import threads_named
from tomepass.printing.plots import INK, SERIES, at_foot, figure, save
from tomepass.printing.style import table
from tomepass.sources.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tomepass.measuring.values import Measurement


Row = Mapping[str, Any]

OUT = Path("tomepass-bench")

_LOG_WIDTH = 160  # no cell of a table is cut short in a file

COMPARED: dict[str, Callable[[Any], str]] = {
    "speed-up": lambda row: f"{row['speed-up']:.2f}x ({row['least']:.2f}-{row['greatest']:.2f})",
    "ideal": lambda row: f"{row['ideal']:.2f}x",
    "ms an image": lambda row: f"{row['ms unmerged']:.1f} -> {row['ms merged']:.1f}",
    "peak MB": lambda row: f"{row['MB unmerged']:.1f} -> {row['MB merged']:.1f}",
}
"""Columns for rows of :func:`compared`."""


def compared(found: Measurement) -> dict[str, float]:
    """What a row says of a model measured against its merged form."""
    return {
        "speed-up": found.ratio.median,
        "least": found.ratio.low,
        "greatest": found.ratio.high,
        "ideal": found.ratio_ideal,
        "ms unmerged": found.original.milliseconds.median,
        "ms merged": found.merged.milliseconds.median,
        "MB unmerged": found.original.peak_bytes / 1e6,
        "MB merged": found.merged.peak_bytes / 1e6,
    }


@dataclass(frozen=True)
class Results:
    """The figures of one benchmark.

    Args:
        name: of its files.
        title: over the table and the plot.
        columns: a header and what a row shows under it.
        rows: raw figures, as they go into the JSON.
        settings: what the rows have in common, for the JSON.
        plot: draws the rows; None for a table alone.
        note: under the table in Markdown.
    """

    name: str
    title: str
    columns: Mapping[str, Callable[[Any], str]]
    rows: Sequence[Row]
    settings: Row
    plot: Callable[[Axes, Sequence[Row]], None] | None
    note: str = ""

    def cells(self) -> list[list[str]]:
        return [[show(row) for show in self.columns.values()] for row in self.rows]

    def publish(self, out: Path) -> None:
        """Prints the table, and writes ``NAME.json``, ``NAME.md`` and ``NAME.png``."""
        where = environment()
        shown = table(self.title, *(name.replace(", ", ",\n") for name in self.columns))
        for cells in self.cells():
            shown.add_row(*cells)
        self.write(out)
        kinds = ".json and .md"
        if self.plot is not None:
            self._draw(self.plot, where, out)
            kinds = ".json, .md and .png"
        console = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH)
        console.print(shown)
        console.print(describe(where))
        console.print(f"written: {out / self.name}{kinds}")

    def write(self, out: Path) -> None:
        """Writes ``NAME.json`` and ``NAME.md``, each there whole or not at all."""
        out.mkdir(parents=True, exist_ok=True)
        data = {
            "benchmark": self.name,
            "settings": self.settings,
            "environment": environment(),
            "rows": self.rows,
        }
        write_whole(out / f"{self.name}.json", json.dumps(data, indent=1) + "\n")
        lines = [list(self.columns), ["---"] * len(self.columns), *self.cells()]
        text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        note = f"\n{self.note}\n" if self.note else ""
        write_whole(out / f"{self.name}.md", text + note)

    def _draw(self, plot: Callable[[Axes, Sequence[Row]], None], where: Row, out: Path) -> None:
        machine = f"{where['cpu']} ({where['cpu_capability']}), {threads_named(where['threads'])}"
        drawn, axes = figure(self.title, f"{machine}, torch {where['torch']}")
        plot(axes, self.rows)
        save(drawn, out / f"{self.name}.png")


def cell(name: str, form: str = "{}") -> Callable[[Any], str]:
    """A column that shows one figure of a row."""
    return lambda row: form.format(row[name])


def bars(axes: Axes, labels: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    """A group of bars a label, one for each series; where they are few, figures at the foot."""
    width = 0.8 / len(series)
    for index, (name, heights, colour) in enumerate(_coloured(series)):
        places = [i + (index - (len(series) - 1) / 2) * width for i in range(len(labels))]
        axes.bar(places, heights, 0.92 * width, color=colour, label=name, zorder=2)
        if len(series) * len(labels) <= 12:
            at_foot(axes, places, [f"{height:.3g}" for height in heights], colour, fontsize=9)
    axes.set_xticks(range(len(labels)), labels)
    _legend(axes, len(series))


def stacks(axes: Axes, labels: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    """A bar a label, the series on top of each other."""
    below = [0.0] * len(labels)
    for name, heights, colour in _coloured(series):
        axes.bar(labels, heights, 0.55, bottom=below, color=colour, label=name, zorder=2)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    _legend(axes, len(series))


def lines(axes: Axes, across: Sequence[float], series: Mapping[str, Sequence[float]]) -> None:
    """A line a series, with a point at each place measured."""
    for name, heights, colour in _coloured(series):
        axes.plot(across, heights, color=colour, marker="o", linewidth=1.8, label=name)
    axes.set_xticks(list(across), [f"{place:g}" for place in across])
    axes.set_ylim(bottom=0)
    _legend(axes, len(series))


def _coloured(
    series: Mapping[str, Sequence[float]],
) -> Iterator[tuple[str, Sequence[float], str]]:
    for (name, heights), colour in zip(series.items(), itertools.cycle(SERIES), strict=False):
        yield name, heights, colour


def _legend(axes: Axes, columns: int) -> None:
    drawn = axes.figure
    drawn.legend(loc="outside lower center", ncols=min(columns, 3), frameon=False, labelcolor=INK)
