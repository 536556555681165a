"""Measured speeds as a picture: bars beside the speed that the arithmetic allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tomepass.printing.plots import INK, QUIET, SERIES, at_foot, figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tomepass.measuring.values import Environment, Measurement


def speed_plot(
    measurements: Sequence[Measurement],
    path: str | Path,
    environment: Environment | None = None,
) -> None:
    """Measured speed-up against the one by MACs alone: a group of bars for each r.

    Args:
        measurements: of one model, dtype, batch and backend; one bar for each method and set of
            backend options. Whiskers span the least and the greatest ratio of a round.
        path: the PNG to write.
        environment: where they were made, for the second line of the title.

    Raises:
        ValueError: if there is nothing to plot, or more than one setting to plot it for.
    """
    from tomepass.measuring.environment import machine

    titles = {m.settings.title for m in measurements}
    if len(titles) != 1:
        raise ValueError(
            "a plot shows one model, dtype, batch and backend, got "
            + (" and ".join(sorted(titles)) or "no measurements")
        )
    first = measurements[0].settings
    labels = list(dict.fromkeys(m.settings.method_label for m in measurements))
    series = list(dict.fromkeys(m.settings.options_label for m in measurements))
    drawn, axes = figure(first.title, machine(first, environment or {}))
    width = min(0.8 / len(series), 0.36)
    for i, options in enumerate(series):
        offset = (i - (len(series) - 1) / 2) * width
        mine = [m for m in measurements if m.settings.options_label == options]
        name = f"measured, {options}" if options else "measured"
        places = [labels.index(m.settings.method_label) + offset for m in mine]
        _bars(axes, places, mine, width, SERIES[i % len(SERIES)], name)
    _ideals(axes, labels, measurements, max(len(series) * width / 2, 0.18) + 0.05)
    axes.axhline(1.0, color=QUIET, linewidth=1.0, zorder=1)
    top = max(max(m.ratio.high, m.ratio_ideal) for m in measurements)
    axes.set_ylim(0, 1.15 * top)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("r, tokens merged a block")
    axes.set_ylabel("speed-up over unmerged")
    axes.yaxis.set_major_formatter("{x:g}x")
    drawn.legend(loc="outside lower center", ncols=len(series) + 1, frameon=False, labelcolor=INK)
    save(drawn, path)


def _bars(
    axes: Axes,
    places: Sequence[float],
    measurements: Sequence[Measurement],
    width: float,
    colour: str,
    name: str,
) -> None:
    heights = [m.ratio.median for m in measurements]
    spread = [
        [m.ratio.median - m.ratio.low for m in measurements],
        [m.ratio.high - m.ratio.median for m in measurements],
    ]
    axes.bar(places, heights, 0.92 * width, color=colour, label=name, zorder=2)
    axes.errorbar(
        places, heights, yerr=spread, fmt="none", ecolor=INK, elinewidth=1.1, capsize=3, zorder=3
    )
    texts = [f"{height:.2f}x" for height in heights]
    at_foot(axes, places, texts, colour, fontsize=10, fontweight="bold")


def _ideals(
    axes: Axes, labels: Sequence[str], measurements: Sequence[Measurement], reach: float
) -> None:
    """A dashed line across each group, with its figure above."""
    ideal = {m.settings.method_label: m.ratio_ideal for m in measurements}
    places = [labels.index(label) for label in ideal]
    axes.hlines(
        list(ideal.values()),
        [place - reach for place in places],
        [place + reach for place in places],
        colors=INK,
        linewidth=1.6,
        linestyles=(0, (4, 2)),
        label="ideal, by multiply-accumulates",
    )
    for place, height in zip(places, ideal.values(), strict=True):
        axes.annotate(
            f"{height:.2f}x",
            (place, height),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            color=INK,
            fontsize=10,
        )
