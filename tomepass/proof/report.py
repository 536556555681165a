"""What `check` returns: a line for each property that was checked, and the table of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.text import Text

from tomepass.methods import Method
from tomepass.printing.style import Printed, facts, table, versions

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType


BLIND = "blind here: "
"""How the note of a line begins that proves nothing for this method, model or inputs."""


@dataclass(frozen=True, repr=False)
class CheckReport(Printed):
    """What :func:`tomepass.check` found, a line a property. Prints as a table.

    ``ok`` is True if no line fails, ``proved`` if every line could be tried and passes;
    ``unproved`` holds those that could not, for this method, model and inputs.
    """

    model: str
    method: Method
    inner: str
    inputs: str
    lines: tuple[CheckLine, ...]

    @property
    def ok(self) -> bool:
        """Did no line fail? A line that is blind for this model says so and does not fail."""
        return all(line.passed is not False for line in self.lines)

    @property
    def proved(self) -> bool:
        """Did every line pass, and was none of them blind?"""
        return self.ok and not self.unproved

    @property
    def unproved(self) -> tuple[CheckLine, ...]:
        """The lines that could prove nothing here: blind for the model, or not for the method."""
        return tuple(line for line in self.lines if line.passed is None and not line.followed)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self) | {
            "method": self.method.to_dict(),
            "ok": self.ok,
            "proved": self.proved,
        }

    def _line(self) -> str:
        failed = sum(line.passed is False for line in self.lines)
        told = [f"{failed} lines fail"] if failed else []
        told += [f"{len(self.unproved)} lines not proved"] if self.unproved else []
        return f"{self.model}: {self.method!r}, {', '.join(told) or 'all checks pass'}"

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:

        yield from check_table(self)


@dataclass(frozen=True)
class CheckLine:
    """One line: what was measured, against what, and whether it passes.

    Args:
        name: what is checked.
        figure: what was measured.
        tolerance: the most it may be.
        passed: None where the figure decides nothing.
        note: why it does not, and what else is to be known.
        followed: whether the next line decides instead, by another figure.
    """

    name: str
    figure: float
    tolerance: float
    passed: bool | None
    note: str = ""
    followed: bool = False


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
    if report.unproved:
        told = "Not proved" if failed else "No check fails, but this is not proved"
        yield Text(f"  {told}:", "yellow")
        for line in report.unproved:
            why = line.note.removeprefix(BLIND) or "nothing to compare"
            yield Padding(Text(f"{line.name.strip()}: {why}", "yellow"), (0, 0, 0, 4))
    elif not failed:
        yield Text("  All checks pass.", "green")
    yield facts(("inputs", [report.inputs]), ("versions", [versions()]))


def _figure(figure: float) -> str:
    whole = math.isfinite(figure) and figure == int(figure)
    return f"{figure:.0f}" if whole else f"{figure:.1e}"
