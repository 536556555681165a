"""What is shown of a result: one line as a repr, and its tables in a notebook."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from encoders import make, pixels

import tomepass
from tomepass import Calibration, CheckReport, Plan, ToMe
from tomepass.calibration.values import Candidate, Score, Tried
from tomepass.printing.style import one_line, to_html
from tomepass.proof.report import CheckLine

LONG = ToMe(list(range(1, 40)))
SCORE = Score(0.25, 0.5, None, 8)
CALIBRATION = Calibration(
    0.6, SCORE, SCORE, SCORE, (0.1, 0.2), (0.3, 0.4), 4, (Candidate(LONG, 0.6, 0.1),), 0
)
PLAN = Plan(ToMe([4, 2]), 1.5, "the <fastest>", (Tried(LONG, 0.6, 1.5, 1.4, 1.6),), "eager", ())


def shown() -> dict[str, Any]:
    """One of each, with a word that its tables say."""
    report = tomepass.explain(make(depth=2), r=4, example_inputs=pixels())
    unmerged = tomepass.explain(make(depth=2), ToMe(2, protected=(99,)), example_inputs=pixels())
    lines = (CheckLine("1. bits", 0.0, 0.0, True), CheckLine("2. matches", 0.0, 0.0, None))
    merged = tomepass.apply(make(depth=2), r=4, example_inputs=pixels())
    return {
        "37 -> 29 tokens, ideal": (report, "37 -> 33"),
        "left unmerged": (unmerged, "lie outside the 37 tokens"),
        "1 lines not proved": (CheckReport("Model", LONG, "eager", "x", lines), "matches"),
        "lines fail": (
            CheckReport("M", LONG, "eager", "x", (CheckLine("5. bits", 1.0, 0.0, False),)),
            "FAILED",
        ),
        "all checks pass": (CheckReport("M", LONG, "eager", "x", lines[:1]), "All checks pass"),
        "1.50x measured": (PLAN, "the <fastest>"),
        "1 candidates at 60.0%": (CALIBRATION, "not linear"),
        "2 images of 37 tokens": (merged.tome.kept_report(pixels()), "places"),
    }


class Text(HTMLParser):
    """What a browser shows, and the elements it is made of."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.open, self.seen = "", [], set()  # type: ignore[var-annotated]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_everything_that_prints_fits_on_a_line_and_is_shown_as_tables() -> None:
    for line, (value, word) in shown().items():
        assert "\n" not in repr(value)
        assert len(repr(value)) <= 100
        assert repr(value).startswith(f"<{type(value).__name__} of ")
        assert line in repr(value), repr(value)
        html = Text(value._repr_html_())
        assert html.open == []
        assert word in html.text
        assert html.seen <= {"pre", "span"}
        # The same words as where it is printed.
        assert html.text.split() == str(value).split()


def test_markup_is_text() -> None:
    assert "the &lt;fastest&gt;" in PLAN._repr_html_()
    assert to_html("a < b").count("&lt;") == 1


@pytest.mark.parametrize("length", [1, 99, 100, 101, 250])
def test_a_line_keeps_its_beginning_and_its_end(length: int) -> None:
    text = "".join(str(i % 10) for i in range(length - 1)) + "e"
    line = one_line(text)
    assert len(line) == min(length, 100)
    assert line[:70] == text[:70]
    assert line[-1] == "e"
    assert (line == text) == (length <= 100)


def test_lines_are_joined() -> None:
    assert one_line("a\n  b\tc") == "a b c"
    assert re.fullmatch(r"<Plan of ToMe\(r=\[4, 2\]\), 1\.50x measured>", repr(PLAN))
