"""Measurements as a table, with its title and legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tomepass.measuring.environment import describe
from tomepass.measuring.values import Environment, Measurement, Settings

if TYPE_CHECKING:
    from rich.console import RenderableType


def bench_table(measurements: Sequence[Measurement], environment: Environment) -> RenderableType:
    """For rich to print: a table for each model, dtype, batch, backend, options and device."""
    from rich.console import Group
    from rich.text import Text

    from tomepass.printing.style import table

    groups: dict[str, list[Measurement]] = {}
    for m in measurements:
        groups.setdefault(_table_title(m.settings), []).append(m)
    parts: list[RenderableType] = []
    for title, group in groups.items():
        made = table(title, "r", "images/s", "speed-up", "ideal", "peak MB", "compile s")
        made.columns[0].no_wrap = True
        for m in group:
            made.add_row(*_row(m))
        parts.append(made)
    if measurements:
        parts.append(Text(_legend(measurements)))
    parts.append(Text(describe(environment)))
    return Group(*parts)


def _table_title(settings: Settings) -> str:
    options = f" ({settings.options_label})" if settings.options_label else ""
    return f"{settings.title}{options}, {settings.where}"


def _row(m: Measurement) -> tuple[str, ...]:
    before, after = m.original, m.merged
    return (
        m.settings.method_label,
        f"{_short(before.images_per_second)} -> {_short(after.images_per_second)}",
        f"{m.ratio.median:.2f}x ({m.ratio.low:.2f}-{m.ratio.high:.2f})",
        f"{m.ratio_ideal:.2f}x",
        f"{_short(before.peak_bytes / 1e6)} -> {_short(after.peak_bytes / 1e6)}",
        f"{before.compile_seconds:.0f} -> {after.compile_seconds:.0f}",
    )


def _legend(measurements: Sequence[Measurement]) -> str:
    rounds = sorted({m.settings.rounds for m in measurements})
    cold = {m.settings.cold for m in measurements}
    caches = "empty compiler caches" if cold == {True} else "compiler caches as they were"
    return (
        f"Unmerged -> merged, both compiled; medians of {' or '.join(map(str, rounds))} "
        "interleaved rounds. Speed-up: the median, least and greatest ratio of a round; ideal: "
        "by multiply-accumulates alone. Peak: the tensors a call holds beyond weights and "
        f"inputs. Compile: the first call, with {caches}."
    )


def _short(value: float) -> str:
    """Three digits: ``0.123``, ``1.23``, ``12.3``, ``123``."""
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(decimals, 0), 4)}f}"
