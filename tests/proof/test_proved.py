"""A check says what it proved: no line that was blind hides behind the word "pass"."""

from __future__ import annotations

import json

import pytest
from depth import at_hand
from encoders import make, pixels
from torch import Tensor, nn

import tomepass
from tomepass import CheckReport, EViT, Method, PiToMe, Prune, Threshold, ToMe
from tomepass.proof.report import BLIND, CheckLine

REFERENCE, LOSSLESS = "2. matches against the reference", "4. lossless on duplicate tokens"
ALL_PASS = "All checks pass."

UNPROVED = {
    ToMe([4, 4]): [],
    PiToMe([4, 4]): [REFERENCE],
    ToMe([4, 4], matching="kmeans"): [REFERENCE],
    Prune([4, 4], score="norm"): [REFERENCE, LOSSLESS],
    Threshold([4, 4], tau=0.5): [REFERENCE],
    EViT(keep_rate=0.7): [REFERENCE, LOSSLESS],
    ToMe([4, 4], prop_attn=False): [LOSSLESS],
}


@pytest.mark.parametrize("method", at_hand(list(UNPROVED), list(UNPROVED)[1:2]), ids=repr)
def test_what_could_not_be_tried_for_a_method_is_named(method: Method) -> None:
    report = tomepass.check(make(depth=2), pixels(3), method, inner="eager")
    assert report.ok, str(report)
    assert [line.name for line in report.unproved] == UNPROVED[method], str(report)
    assert report.proved == (not UNPROVED[method])
    assert json.loads(json.dumps(report.to_dict()))["proved"] is report.proved
    end = str(report)
    assert (ALL_PASS in end) == report.proved
    for name in UNPROVED[method]:
        assert f"    {name}: " in end


def report_of(*lines: CheckLine) -> CheckReport:
    return CheckReport("Model", ToMe(4), "eager", "x", lines)


BLIND_LINE = CheckLine("4. lossless", 0.0, 1e-4, None, f"{BLIND}nothing is alike")


def test_a_line_that_the_next_one_decides_is_not_unproved() -> None:
    decided = CheckLine("3. compiled", 0.5, 1e-4, None, "see the next line", followed=True)
    report = report_of(decided, CheckLine("   replayed", 0.0, 1e-4, True))
    assert report.proved
    assert ALL_PASS in str(report)


def test_a_failure_beside_a_blind_line_shows_both() -> None:
    report = report_of(BLIND_LINE, CheckLine("5. bits", 1.0, 0.0, False))
    assert (report.ok, report.proved) == (False, False)
    text = str(report)
    assert "FAILED 5. bits: 1, allowed 0" in text
    assert "Not proved:" in text
    assert "4. lossless: nothing is alike" in text
    assert ALL_PASS not in text


def test_a_failure_alone_is_not_proved_either() -> None:
    report = report_of(CheckLine("5. bits", 1.0, 0.0, False))
    assert (report.ok, report.proved, report.unproved) == (False, False, ())
    assert "roved" not in str(report)


class Summed(nn.Module):
    """One number for all images together."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = make(depth=1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels).sum()  # type: ignore[no-any-return]


def test_without_an_output_of_one_image_nothing_is_proved_of_neighbours() -> None:
    report = tomepass.check(Summed().eval(), pixels(3), r=2, inner="eager")
    (neighbours,) = [line for line in report.lines if "neighbours" in line.name]
    assert neighbours.passed is None
    assert neighbours in report.unproved
