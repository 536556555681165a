"""The logger tells what is captured, chosen and cached; unasked, nothing is said."""

from __future__ import annotations

import logging

import pytest
import torch
from encoders import make, pixels

import tomepass


def test_what_is_captured_chosen_and_kept_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tomepass"):
        merged = tomepass.apply(make(depth=1), r=2, example_inputs=pixels(), captures=1)
        first = [record.getMessage() for record in caplog.records]
        merged(pixels())
        assert len(caplog.records) == len(first)
        merged.double()(pixels().double())
        later = [record.getMessage() for record in caplog.records[len(first) :]]
    assert first[0].startswith("captured: Encoder.forward for pixels float32[B, 3, 24, 24] in ")
    assert first[1].startswith("chosen: <Report of Encoder: ToMe(r=2), 37 -> 35 tokens, ideal ")
    assert first[2:] == ["kept: 1 of at most 1 captures, 0 dropped"]
    assert later[0].startswith("captured: Encoder.forward for pixels float64[")
    assert later[-1] == "kept: 1 of at most 1 captures, 1 dropped"
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_unasked_nothing_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    with torch.no_grad():
        tomepass.apply(make(depth=1), r=2, example_inputs=pixels())
    assert capfd.readouterr().err == ""
    assert logging.getLogger("tomepass").handlers == []
