"""Everything that prints: rich tables of reports, and their plain text."""

from __future__ import annotations

import io
import platform
import sys
from collections.abc import Sequence
from typing import cast

from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text


def to_text(renderable: RenderableType, width: int = 100) -> str:
    """A renderable as plain text, as it stands in a file or a bug report."""
    file = io.StringIO()
    Console(width=width, color_system=None, legacy_windows=False, file=file).print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).rstrip("\n")


def to_html(renderable: RenderableType, width: int = 100) -> str:
    """A renderable as a piece of HTML, as a notebook shows it."""
    console = Console(width=width, record=True, file=io.StringIO(), legacy_windows=False)
    console.print(renderable)
    form = '<pre style="white-space: pre; overflow-x: auto; line-height: 1.2">{code}</pre>'
    return console.export_html(inline_styles=True, code_format=form)


def one_line(text: str, width: int = 100) -> str:
    """A text on one line of at most so many characters, its end kept: a ``repr``."""
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    tail = width // 4
    return f"{text[: width - tail - 3]}...{text[-tail:]}"


class Printed:
    """What prints as tables, and is shown as such in a notebook.

    A subclass defines ``__rich_console__``, and ``_line``: what it is, on one line.
    """

    def __str__(self) -> str:
        return to_text(cast(RenderableType, self))

    def _repr_html_(self) -> str:
        return to_html(cast(RenderableType, self))

    def _line(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        return one_line(f"<{type(self).__name__} of {self._line()}>")


def progress_bar(shown: bool = True) -> Progress:
    """A bar on standard error for work of several steps, gone when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown)


def table(title: str, *columns: str, caption: str | None = None) -> Table:
    """An empty table in the house style: first column left, numbers right."""
    made = Table(
        title=title, title_justify="left", caption=caption, caption_justify="left", box=box.SIMPLE
    )
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    return made


def gmacs(macs: float) -> str:
    """Multiply-accumulates in the largest unit that leaves a digit before the point."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if macs >= unit:
            return f"{macs / unit:.3f} {name}"
    return f"{macs:.0f}"


def facts(*facts: tuple[str, list[str]]) -> RenderableType:
    """Labelled lines, indented behind their labels; labels without lines are left out."""
    # No padding on the left of a column: versions of rich differ on whether it collapses.
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(min_width=len("  protected"))
    made.add_column(overflow="fold")
    for label, lines in facts:
        for i, line in enumerate(lines):
            made.add_row(Text("" if i else f"  {label}"), Text(line))
    return made


def ranges(numbers: Sequence[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number <= runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def versions() -> str:
    known = [("Python", platform.python_version())]
    for name in ("tomepass", "torch", "transformers"):
        if (module := sys.modules.get(name)) is not None:
            known.append((name, str(getattr(module, "__version__", "?"))))
    return ", ".join(f"{name} {version}" for name, version in known)
