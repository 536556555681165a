"""Plots of measurements, as PNG files made for a README's width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK = "#1f2933"

QUIET = "#7b8794"

GRID = "#e4e7eb"

_DEEP, _SOFT = "#2f74b5", "#a3c5e5"

SERIES = (_DEEP, _SOFT, "#e0a458", "#6a4c93", "#5b8c5a", "#b8b8b8", "#b8574f")

_SIZE = (7.6, 4.2)  # inches; at 160 dots an inch, 1216 x 672 pixels

_DOTS = 160


def accuracy_plot(rows: Sequence[Any], path: str | Path, title: str = "") -> None:
    """Accuracy against speed: a point for each r, the unmerged model set apart.

    Args:
        rows: objects or dicts with ``r`` (0 is the unmerged model), ``accuracy`` in percent and
            ``images_per_second``. Where accuracy is None, ``agreement`` takes its place.
        path: the PNG to write.
        title: over the plot.

    Raises:
        ValueError: if there is nothing to plot.
    """
    if not rows:
        raise ValueError("there are no rows to plot")
    labelled = all(_field(row, "accuracy") is not None for row in rows)
    rates = [float(_field(row, "images_per_second")) for row in rows]
    shares = [float(_field(row, "accuracy" if labelled else "agreement")) for row in rows]
    drawn, axes = figure(title)
    axes.plot(rates, shares, color=_SOFT, linewidth=1.8, zorder=2)
    for row, rate, share in zip(rows, rates, shares, strict=True):
        unmerged = str(_field(row, "r")) == "0"
        axes.plot(
            rate,
            share,
            marker="o",
            markersize=9,
            color="white" if unmerged else _DEEP,
            markeredgecolor=INK if unmerged else _DEEP,
            markeredgewidth=1.6,
            zorder=3,
        )
        axes.annotate(
            "unmerged" if unmerged else f"r = {_field(row, 'r')}",
            (rate, share),
            xytext=(8, 7),  # a falling line leaves this side free
            textcoords="offset points",
            color=INK,
        )
    _roomy(axes, rates, shares)
    axes.set_xlabel("images per second")
    axes.set_ylabel("top-1 accuracy (%)" if labelled else "agreement with unmerged (%)")
    save(drawn, path)


def profile_plot(
    linearity: Sequence[float], sensitivity: Sequence[float], alone: int, path: str | Path
) -> None:
    """What a calibration measured of each block: two rows of bars over the blocks.

    Args:
        linearity: 0 where a block is linear.
        sensitivity: divergence when a block alone loses tokens.
        alone: how many.
        path: the PNG to write.
    """
    drawn, axes = figure("What each block takes")
    twin = axes.twinx()
    places = range(len(linearity))
    axes.bar([i - 0.2 for i in places], linearity, 0.36, color=_DEEP, label="not linear (left)")
    label = f"divergence if {alone} tokens go here alone (right)"
    twin.bar([i + 0.2 for i in places], sensitivity, 0.36, color=_SOFT, label=label)
    twin.spines[["top", "left", "bottom"]].set_visible(False)
    twin.tick_params(colors=INK, length=0, labelsize=10)
    axes.set_xticks(list(places))
    axes.set_xlabel("block")
    drawn.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=INK)
    save(drawn, path)


def save(drawn: Figure, path: str | Path) -> None:
    """Writes a figure as a PNG, 1216 x 672 pixels."""
    drawn.savefig(path, dpi=_DOTS)


def figure(title: str, subtitle: str = "") -> tuple[Figure, Axes]:
    """An empty plot in the project's style, wide enough for a README."""
    # Not pyplot: it would keep the figure, and choose a backend for the whole process.
    from matplotlib.figure import Figure

    drawn = Figure(figsize=_SIZE, layout="constrained", facecolor="white")
    axes = drawn.subplots()
    if title:
        pad = 26 if subtitle else 12
        axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=pad)
    if subtitle:
        axes.annotate(
            subtitle,
            (0, 1),
            xytext=(0, 8),
            xycoords="axes fraction",
            textcoords="offset points",
            color=QUIET,
            fontsize=10,
        )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.tick_params(colors=INK, length=0, labelsize=10)
    axes.grid(axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return drawn, axes


def at_foot(
    axes: Axes, places: Sequence[float], texts: Sequence[str], colour: str, **style: Any
) -> None:
    """Labels inside bars, at the foot: the head belongs to whiskers and other marks."""
    for place, text in zip(places, texts, strict=True):
        axes.annotate(
            text,
            (place, 0),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            color=contrast(colour),
            zorder=4,
            **style,
        )


def contrast(colour: str) -> str:
    """White on dark, ink on light."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"


def _roomy(axes: Axes, rates: Sequence[float], shares: Sequence[float]) -> None:
    """Room for the labels, and never a scale so fine that noise looks like a cliff."""
    across = max(max(rates) - min(rates), 0.05 * max(rates))
    axes.set_xlim(min(rates) - 0.12 * across, max(rates) + 0.2 * across)
    middle, up = (max(shares) + min(shares)) / 2, max(max(shares) - min(shares), 2.0)
    axes.set_ylim(middle - 0.75 * up, middle + 0.75 * up)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 100])
    axes.set_ylim(middle - 0.75 * up, middle + 0.75 * up)  # ticks may have widened it


def _field(row: Any, name: str) -> Any:
    return row[name] if isinstance(row, Mapping) else getattr(row, name)
