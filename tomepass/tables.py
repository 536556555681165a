"""Everything that prints: rich tables of reports, and their plain text."""

from __future__ import annotations

import io
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tomepass.equivalence import CheckReport
    from tomepass.kept import KeptReport
    from tomepass.plans import Plan
    from tomepass.report import Report, StreamReport
    from tomepass.structure import Mismatch


def to_text(renderable: RenderableType, width: int = 100) -> str:
    """A renderable as plain text, as it stands in a file or a bug report."""
    file = io.StringIO()
    Console(width=width, color_system=None, legacy_windows=False, file=file).print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).rstrip("\n")


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


def report_tables(report: Report) -> Iterator[RenderableType]:
    """The printed form of ``explain``."""
    title = f"{report.model}: {report.method!r}"
    if not report.streams:
        yield Text(f"{title}: left unmerged", style="bold")
    for number, stream in enumerate(report.streams):
        suffix = f", stream {number}" if len(report.streams) > 1 else ""
        yield _stream_table(stream, title + suffix)
        yield _facts(
            ("protected", [_positions(stream.protected)]),
            ("beside", list(stream.sides)),
            ("read by", list(stream.readout)),
        )
    yield _facts(
        ("unmerged", [_reason(m) for m in report.unmerged]),
        ("refused", [_reason(m, blocks) for m, blocks in _alike(report.refused)]),
        ("MACs", _costs(report)),
        ("paths", list(report.paths)),
        ("kernels", list(report.kernels)),
        ("notes", list(report.notes)),
        ("inputs", [report.inputs]),
        ("versions", [_versions()]),
    )


def check_table(report: CheckReport) -> Iterator[RenderableType]:
    """The printed form of ``check``."""
    title = f"{report.model}: {report.method!r}, {report.inner}"
    made = table(title, "check", "figure", "tolerance", "verdict")
    styles = {True: ("pass", "green"), False: ("FAIL", "bold red"), None: ("-", "yellow")}
    for line in report.lines:
        word, style = styles[line.passed]
        made.add_row(
            line.name,
            _figure(line.figure),
            _figure(line.tolerance) if line.tolerance < float("inf") else "-",
            Text(word, style),
        )
        if line.note:
            made.add_row(Padding(Text(line.note, "dim"), (0, 0, 0, 5)))
    yield made
    failed = [line for line in report.lines if line.passed is False]
    for line in failed:
        figures = f"{_figure(line.figure)}, allowed {_figure(line.tolerance)}"
        yield Text(f"  FAILED {line.name.strip()}: {figures}", "bold red")
    if not failed:
        yield Text("  All checks pass.", "green")
    yield _facts(("inputs", [report.inputs]), ("versions", [_versions()]))


def plan_tables(plan: Plan) -> Iterator[RenderableType]:
    """The printed form of a plan."""
    yield Text(f"{plan.method!r}: {plan.why}")
    for t in plan.tried:
        spread = f"{t.speedup:.2f}x ({t.least:.2f}-{t.greatest:.2f})"
        yield Text(f"  {spread} with {t.macs:.0%} of the MACs: {t.method!r}")
    if (found := plan.calibration) is None:
        return
    counts = plan.method.counts(len(found.linearity))
    made = table("", "block", "r", "not linear", f"divergence if {found.alone} go here alone")
    rows = zip(counts, found.linearity, found.sensitivity, strict=True)
    for index, (r, bent, alone) in enumerate(rows):
        made.add_row(str(index), str(r), f"{bent:.3f}", f"{alone:.4f}")
    yield made
    made = table("", "images", "divergence", "same top-1", "even ToMe's divergence")
    for name, score, even in (
        (f"{found.tuned.images} tuned on", found.tuned, ""),
        (f"{found.held_out.images} held out", found.held_out, f"{found.even.divergence:.4f}"),
    ):
        agreed = "" if score.agreement is None else f"{score.agreement:.1%}"
        made.add_row(name, f"{score.divergence:.4f}", agreed, even)
    yield made
    yield _facts(
        ("MACs", [f"{found.macs:.1%} of the unmerged ones"]),
        ("tried", [f"{len(found.tried)} candidates, seed {found.seed}"]),
        ("versions", [_versions()]),
    )


def kept_table(report: KeptReport) -> Table:
    """The printed form of ``kept_report``."""
    title = f"{report.model}: {report.method!r}"
    columns = ("places", "min", "25 %", "50 %", "75 %", "max", "mean")
    caption = f"tokens in use, of {report.tokens}, over {report.images} images"
    made = table(title, "block", *columns, caption=caption)
    for b in report.blocks:
        quartiles = (f"{figure:g}" for figure in (b.lower, b.median, b.upper))
        made.add_row(
            *(str(b.index), str(b.places), str(b.least), *quartiles, str(b.most)), f"{b.mean:.1f}"
        )
    return made


def _figure(figure: float) -> str:
    whole = math.isfinite(figure) and figure == int(figure)
    return f"{figure:.0f}" if whole else f"{figure:.1e}"


def _stream_table(stream: StreamReport, title: str) -> Table:
    made = table(title, "block", "tokens", "r", "MACs", "of original", "attention at")
    made.columns[-1].justify = "left"
    for b in stream.blocks:
        share = b.macs / b.macs_original if b.macs_original else 1.0
        made.add_row(
            str(b.index),
            f"{b.tokens_in} -> {b.tokens_out}",
            str(b.r),
            gmacs(b.macs),
            f"{share:.0%}",
            (b.source or b.attention).split(": ")[0].split("/")[-1],
        )
    return made


def _facts(*facts: tuple[str, list[str]]) -> RenderableType:
    """Labelled lines, indented behind their labels; labels without lines are left out."""
    # No padding on the left of a column: versions of rich differ on whether it collapses.
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(min_width=len("  protected"))
    made.add_column(overflow="fold")
    for label, lines in facts:
        for i, line in enumerate(lines):
            made.add_row(Text("" if i else f"  {label}"), Text(line))
    return made


def _reason(mismatch: Mismatch, blocks: Sequence[int] = ()) -> str:
    file, _, code = (mismatch.source or "").partition(": ")
    where = [f"block{'s' if len(blocks) > 1 else ''} {_ranges(blocks)}"] if blocks else []
    where += [f"node {mismatch.node}"] if mismatch.node else []
    where += [file] if file else []
    details = [", ".join(where), code, f"what to do: {mismatch.advice}" if mismatch.advice else ""]
    return "\n".join([mismatch.reason, *(f"- {detail}" for detail in details if detail)])


def _alike(mismatches: Sequence[Mismatch]) -> list[tuple[Mismatch, list[int]]]:
    """Mismatches with the same reason at the same place told once, with all their blocks."""
    found: dict[object, tuple[Mismatch, list[int]]] = {}
    for mismatch in mismatches:
        key = (mismatch.reason, mismatch.source, mismatch.advice)
        _, blocks = found.setdefault(key, (mismatch, []))
        blocks += [mismatch.block] if mismatch.block is not None else []
    return list(found.values())


def _costs(report: Report) -> list[str]:
    unmerged = f"{gmacs(report.macs_original)} an image unmerged"
    if not report.streams:
        return [unmerged]
    return [
        f"{unmerged}, {gmacs(report.macs)} merged: ideal speed-up {report.speedup_ideal:.2f}x",
        f"{gmacs(report.macs_overhead)} more for matching and merging",
    ]


def _positions(positions: Sequence[int]) -> str:
    if not positions:
        return "no token"
    return f"token{'s' if len(positions) > 1 else ''} {_ranges(positions)}"


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number <= runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _versions() -> str:
    known = [("Python", platform.python_version())]
    for name in ("tomepass", "torch", "transformers"):
        if (module := sys.modules.get(name)) is not None:
            known.append((name, str(getattr(module, "__version__", "?"))))
    return ", ".join(f"{name} {version}" for name, version in known)
