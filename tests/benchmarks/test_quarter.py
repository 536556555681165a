"""A quarter of an hour on a GPU: what is started, skipped and kept, with a clock that is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.gpu import correctness, on_device, publishing, quarter
from benchmarks.gpu.publishing import Asked
from benchmarks.gpu.quarter import Outcome, Part, planned_parts, spend

pytest.importorskip("triton")

LIKE = Asked("kernels", rounds=1, tiny=True)


class Clock:
    """Shows what the parts are said to take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, minutes: float) -> Callable[[], None]:
        def pass_by() -> None:
            self.now += 60 * minutes

        return pass_by


def part(only: str, minutes: float, most: float = 99.0) -> Part:
    return Part(replace(LIKE, only=only), minutes, most)


def spent(minutes: float, *parts: tuple[str, float, Any]) -> dict[str, Outcome]:
    """What becomes of parts: name, minutes expected, and minutes it takes or what it raises."""
    clock, found = Clock(), {}
    real = {name: taken for name, _, taken in parts}

    def run(part: Part, seconds: float) -> Outcome:
        taken = real[part.asked.only]
        if isinstance(taken, Exception):
            raise taken
        clock.takes(min(taken, seconds / 60))()
        return Outcome("stopped" if 60 * taken > seconds else "done")

    def keep(part: Part, outcome: Outcome) -> None:
        found[part.asked.only] = outcome

    spend([part(name, expected) for name, expected, _ in parts], minutes, run, keep, clock)
    return found


def test_what_does_not_fit_is_skipped_and_what_fits_after_it_is_run() -> None:
    found = spent(10, ("profile", 4, 6), ("vit_b", 5, 5), ("bandwidth", 4, 1))
    assert [outcome.state for outcome in found.values()] == ["done", "skipped", "done"]
    assert found["vit_b"].why == "expected to take 5 min, 4.0 min are left"
    assert [outcome.seconds for outcome in found.values()] == [360, 0, 60]


def test_a_part_that_fits_to_the_second_is_run() -> None:
    assert spent(5, ("profile", 3, 3), ("vit_b", 2, 2))["vit_b"].state == "done"


def test_a_part_is_over_when_time_is() -> None:
    found = spent(5, ("profile", 1, 9), ("vit_b", 0.5, 1))
    assert (found["profile"].state, found["profile"].seconds) == ("stopped", 300)
    assert found["vit_b"].why == "expected to take 0.5 min, 0.0 min are left"


def test_a_part_that_hangs_leaves_time_for_the_others() -> None:
    allowed = []

    def run(part: Part, seconds: float) -> Outcome:
        allowed.append(seconds)
        return Outcome("done")

    parts = [part("profile", 1, most=2), part("vit_b", 1, most=99)]
    spend(parts, 5, run, lambda part, outcome: None, Clock())
    assert allowed == [120, 300]


def test_what_a_part_raises_is_kept_and_the_next_one_goes_on() -> None:
    found = spent(5, ("profile", 1, OSError("no such file")), ("vit_b", 1, 1))
    assert (found["profile"].state, found["profile"].why) == ("failed", "OSError: no such file")
    assert found["vit_b"].state == "done"


def test_a_quarter_of_an_hour_is_enough_if_all_goes_as_expected() -> None:
    parts = planned_parts(replace(LIKE, tiny=False))
    assert sum(part.minutes for part in parts) <= 15
    assert all(part.minutes < part.most for part in parts)
    assert [part.asked.file for part in parts] == [
        "gpu_correctness_bf16",
        "gpu_vit_b_default_r16_bf16",
        "gpu_vit_b_reduce-overhead_r16_bf16",
        "gpu_profile_default_bf16",
        "gpu_bandwidth_bf16",
        "gpu_batch1_reduce-overhead_bf16",
        "gpu_attention_bf16",
    ]
    assert "--minutes 3 " in " ".join(parts[0].asked.arguments) + " "


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (Outcome("done", rows=({"case": "a", "right": "yes"},)), 0),
        (Outcome("done", rows=({"case": "a", "right": "NO"},)), 1),
        (Outcome("failed", why="it broke"), 1),
        (Outcome("skipped", why="no time"), 0),
    ],
)
def test_the_summary_is_written_after_each_part(
    outcome: Outcome, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = (part("correctness", 1), part("memory", 1))
    there: list[int] = []

    def run(part: Part, seconds: float, out: Path) -> Outcome:
        if part.asked.only == "correctness":
            return outcome
        written = json.loads((out / "gpu_quarter_tiny.json").read_text())
        there.append(len(written["rows"]))
        return Outcome("stopped", why="after 1 min")

    monkeypatch.setattr(quarter, "planned_parts", lambda like: parts)
    monkeypatch.setattr(quarter, "run_part", run)
    assert quarter.quarter_of_an_hour(LIKE, tmp_path) == code
    assert there == [1]
    written = json.loads((tmp_path / "gpu_quarter_tiny.json").read_text())
    assert {"gpu", "torch", "triton", "transformers", "command"} <= set(written["settings"])
    assert written["rows"][0]["rows"] == list(outcome.rows)
    assert outcome.state in (tmp_path / "gpu_quarter_tiny.md").read_text()


def test_a_process_that_fails_is_told_by_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    said = "Traceback:\nRuntimeError: illegal | access\nnanobind: leaked 64 types!"
    script.write_text(f"#!/bin/sh\necho '{said}'\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(quarter.sys, "executable", str(script))
    (tmp_path / "gpu_bandwidth_bf16_tiny.json").write_text('{"rows": [{"of": "an earlier run"}]}')
    failed = quarter.run_part(part("bandwidth", 1), 20, tmp_path)
    assert failed.state == "failed"
    assert (failed.why, failed.rows) == ("RuntimeError: illegal / access", ())
    assert (tmp_path / "gpu_bandwidth_bf16_tiny.log").exists()


def test_a_process_that_hangs_is_stopped_and_its_rows_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, file = tmp_path / "python", tmp_path / "gpu_bandwidth_bf16_tiny.json"
    script.write_text(f'#!/bin/sh\necho \'{{"rows": [{{"a": 1}}]}}\' > {file}\nsleep 60\n')
    script.chmod(0o755)
    monkeypatch.setattr(quarter.sys, "executable", str(script))
    found = quarter.run_part(part("bandwidth", 1), 0.5, tmp_path)
    assert (found.state, list(found.rows)) == ("stopped", [{"a": 1}])


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    file = tmp_path / f"{LIKE.file}.json"

    def rows() -> Any:
        yield {"a": 1}
        written = json.loads(file.read_text())
        assert (written["rows"], written["settings"]["complete"]) == ([{"a": 1}], False)
        yield {"a": 2}

    publishing.publish(LIKE, rows(), torch.device("cpu"), tmp_path)
    written = json.loads(file.read_text())
    assert (written["rows"], written["settings"]["complete"]) == ([{"a": 1}, {"a": 2}], True)


# ---- correctness ---------------------------------------------------------------------------


def test_cases_are_run_until_time_is_up() -> None:
    clock = Clock()

    def wrong(device: str) -> None:
        clock.takes(1)()
        assert device == "cuda", f"on {device}"

    cases = {
        "a": lambda device: clock.takes(1)(),
        "b": wrong,
        "c": lambda device: clock.takes(1)(),
    }
    found = list(correctness.run_cases(cases, torch.device("cpu"), 100, clock))
    assert [row["right"] for row in found] == ["yes", "NO", "not run"]
    assert "AssertionError: on cpu" in found[1]["error"]
    assert found[2]["error"] == "1.66667 minutes were over"
    assert found[0]["seconds"] == 60


def test_nothing_more_is_run_on_a_device_that_answers_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(device: str) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(correctness, "_answers", lambda device: False)
    cases = {"a": broken, "b": lambda device: None}
    found = list(correctness.run_cases(cases, torch.device("cpu"), 100, Clock()))
    assert [row["right"] for row in found] == ["NO", "not run"]
    assert found[1]["error"] == "the device answers no more since 'a'"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter")
def test_cases_see_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"maps": on_device.TINY_CASES["maps of float32, 17 tokens"]}
    run: Any = lambda: list(correctness.run_cases(cases, torch.device("cpu"), 100, Clock()))  # noqa: E731
    assert [row["right"] for row in run()] == ["yes"]
    composite = on_device.checks.match
    monkeypatch.setattr(on_device.checks, "match", lambda *given: composite(*given).flip(1))
    assert [row["right"] for row in run()] == ["NO"]


# ---- all of it -----------------------------------------------------------------------------


@pytest.mark.deep
@pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter")
def test_a_tiny_quarter_from_end_to_end(tmp_path: Path) -> None:
    words = ["gpu", "--quarter", "--tiny", "--rounds", "1", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "gpu_quarter_tiny.json").read_text())
    assert [row["state"] for row in written["rows"]] == ["done"] * 7, written["rows"]
    assert all(row["rows"] for row in written["rows"])
    assert len(list(tmp_path.glob("gpu_*.json"))) == 8
