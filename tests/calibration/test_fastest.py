"""Plans by measurement: what is chosen for which figures; nothing here depends on a clock."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import make_inputs, make_model

import tomepass
from tomepass import Plan, ToMe, TomeError
from tomepass.calibration import fastest as plans
from tomepass.calibration.values import Tried

pytestmark = pytest.mark.usefixtures("captured_once")

Speeds = Callable[[ToMe, float], float]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Speeds], list[ToMe]]:
    """Makes the clock say what a function of the method and its MAC-ideal speed-up says."""

    def pretend(speeds: Speeds) -> list[ToMe]:
        measured: list[ToMe] = []

        def measure(model: Any, inputs: Any, method: ToMe, **options: Any) -> Any:
            measured.append(method)
            ideal = tomepass.explain(model, method, example_inputs=inputs).speedup_ideal
            return method, ideal, speeds(method, ideal)

        def tried(found: Any) -> Tried:
            method, ideal, speed = found
            return Tried(method, 1 / ideal, speed, speed, speed)

        monkeypatch.setattr(plans, "measure", measure)
        monkeypatch.setattr(plans, "_tried", tried)
        return measured

    return pretend


@functools.cache
def vit() -> Any:
    return make_model("vit")


def planned(**target: Any) -> Plan:
    return tomepass.plan(vit(), make_inputs("vit"), progress=False, **target)


def test_the_fastest_of_equal_or_fewer_macs_is_chosen(machine: Any) -> None:
    measured = machine(lambda method, ideal: 2.0 if method.schedule.values[1] == 0 else 1.5)
    plan = planned(r=6)
    # As asked for; rounded to 8; to 16; every second block. 65 tokens, three blocks.
    assert measured == [ToMe([6, 6, 6]), ToMe([9, 8, 8]), ToMe([17, 0, 16]), ToMe([12, 0, 6])]
    assert plan.method == ToMe([17, 0, 16])
    assert plan.merges
    assert plan.speedup == 2.0
    assert max(t.macs for t in plan.tried) == plan.tried[0].macs
    assert "2.00x measured" in plan.why


def test_where_merging_does_not_pay_it_says_so(machine: Any) -> None:
    machine(lambda method, ideal: 0.97)
    plan = planned(macs=0.9)
    assert not plan.merges
    assert plan.method == ToMe(0)
    assert "do not merge" in plan.why
    assert "0.97x" in plan.why
    assert len(plan.tried) > 1


def test_a_speedup_is_approached_from_below(machine: Any) -> None:
    measured = machine(lambda method, ideal: 1 + 0.6 * (ideal - 1))
    plan = planned(speedup=1.25)
    speeds = [t.speedup for t in plan.tried]
    assert speeds == sorted(speeds)
    assert speeds[-1] >= 1.25 > speeds[-2]
    assert plan.method == measured[-1]
    assert "not reached" not in plan.why


@pytest.mark.deep
def test_a_speedup_that_the_machine_does_not_give_is_told(machine: Any) -> None:
    machine(lambda method, ideal: min(ideal, 1.1))
    plan = planned(speedup=1.3)
    assert plan.speedup == 1.1
    assert "1.3x was asked for and not reached" in plan.why


def test_a_plan_survives_its_file(machine: Any, tmp_path: Path) -> None:
    machine(lambda method, ideal: ideal)
    plan = planned(r=[5, 0, 9])
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert str(plan).startswith(repr(plan.method))
    merged = tomepass.apply(vit(), again.method)
    assert [b.r for b in merged.report(make_inputs("vit")).blocks] == [
        int(r) for r in plan.method.schedule.values
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"method": {"method": "other"}, "tried": []}'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(TomeError):
        Plan.from_json(text)


def test_a_model_that_cannot_be_merged_is_refused_before_anything_is_measured(
    machine: Any,
) -> None:
    measured = machine(lambda method, ideal: 1.0)
    with pytest.raises(TomeError, match="causal"):
        tomepass.plan(make_model("gpt2"), make_inputs("gpt2"), r=4, progress=False)
    assert not measured


def test_one_of_the_three_targets_at_most() -> None:
    with pytest.raises(TypeError, match="give one of r, macs, speedup and keep_rate"):
        planned(r=8, speedup=1.5)


@pytest.mark.deep
def test_a_real_measurement_becomes_a_plan() -> None:
    with torch.no_grad():
        plan = planned(r=[9], inner="eager", rounds=1)
    assert plan.tried[0].method == ToMe([9, 0, 0])
    assert plan.inner == "eager"
    assert dict(plan.environment)["torch"] == torch.__version__
    assert plan.speedup == max([1.0, *(t.speedup for t in plan.tried)])


def test_a_plan_in_another_encoding_says_so(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes('{"why": "schöner"}'.encode("latin-1"))
    with pytest.raises(TomeError, match=r"'plan.json' is no plan: it is not UTF-8"):
        Plan.load(tmp_path / "plan.json")
