"""Everything that prints: rich tables of reports, and their plain text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tomepass.equivalence import CheckReport
    from tomepass.report import Report, StreamReport


def to_text(renderable: RenderableType, width: int = 100) -> str:
    """A renderable as plain text, as it stands in a file or a bug report."""
    console = Console(width=width, color_system=None, legacy_windows=False, file=_Nowhere())
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().rstrip("\n")


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


def report_tables(report: Report) -> Iterator[RenderableType]:
    """The printed form of ``explain``."""
    title = f"{report.model}: {report.method!r}"
    for number, stream in enumerate(report.streams):
        suffix = f", stream {number}" if len(report.streams) > 1 else ""
        yield _stream_table(stream, title + suffix)
    if not report.streams:
        yield Text(f"{title}: left unmerged", style="bold")
    if report.streams:
        yield Text(
            f"MACs per image: {gmacs(report.macs_original)} unmerged, {gmacs(report.macs)} merged "
            f"(+ {gmacs(report.macs_overhead)} matching and merging); "
            f"ideal speed-up {report.speedup_ideal:.2f}x"
        )
    for line in report.unmerged:
        yield Text(f"unmerged before {line}")
    for mismatch in report.refused:
        where = [f"block {mismatch.block}"] if mismatch.block is not None else []
        where += [f"node {mismatch.node}"] if mismatch.node else []
        where += [mismatch.source] if mismatch.source else []
        yield Text(f"refused: {mismatch.reason}" + (f" [{', '.join(where)}]" if where else ""))
        if mismatch.advice:
            yield Text(f"  what to do: {mismatch.advice}")


def check_table(report: CheckReport) -> Iterator[RenderableType]:
    """The printed form of ``check``."""
    made = table(
        f"{report.model}: {report.method!r}, {report.inner}, {report.inputs}",
        "check",
        "figure",
        "tolerance",
        "verdict",
        "note",
    )
    made.columns[-1].justify = "left"
    made.columns[-1].no_wrap = False
    styles = {True: ("pass", "green"), False: ("FAIL", "bold red"), None: ("-", "yellow")}
    for line in report.lines:
        word, style = styles[line.passed]
        tolerance = "-" if line.passed is None else f"{line.tolerance:.0e}"
        if line.tolerance in (0.0, 2.0):
            tolerance = f"{line.tolerance:.0f}"
        made.add_row(line.name, _figure(line.figure), tolerance, Text(word, style), line.note)
    yield made
    failed = [line for line in report.lines if line.passed is False]
    for line in failed:
        yield Text(
            f"FAILED: {line.name.strip()}: {_figure(line.figure)}, allowed {line.tolerance:g}"
        )
    if not failed:
        yield Text("All checks pass.", "green")


def _figure(figure: float) -> str:
    return f"{figure:.0f}" if figure == int(figure) else f"{figure:.1e}"


def _stream_table(stream: StreamReport, title: str) -> Table:
    made = table(title, "block", "tokens", "r", "MACs", "of original", "attention at")
    made.columns[-1].justify = "left"
    made.columns[-1].no_wrap = False
    for b in stream.blocks:
        share = b.macs / b.macs_original if b.macs_original else 1.0
        made.add_row(
            str(b.index),
            f"{b.tokens_in} -> {b.tokens_out}",
            str(b.r),
            gmacs(b.macs),
            f"{share:.0%}",
            (b.source or b.attention).split(": ")[0],
        )
    lines = [f"protected tokens: {list(stream.protected) or 'none'}", *stream.readout]
    made.caption = "\n".join(lines)
    return made


class _Nowhere:
    """A file for a console that only captures."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return None
