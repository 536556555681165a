"""Multiply-accumulates before and after count the same code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import Encoder, make, pixels
from generated import Kind, Spelling, build, kinds, spellings
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from zoo import FAMILIES, make_inputs

import tomepass
from tomepass import ToMe


class Auxiliary(Encoder):
    """A head that nobody reads, with dropout and attention, as segmentation models have."""

    def __init__(self, **choices: Any) -> None:
        super().__init__(**choices)
        self.aside, self.drop = nn.Linear(16, 256), nn.Dropout(0.1)

    def read(self, x: Tensor) -> Any:
        self.drop(self.aside(x)).relu()
        return super().read(x)


def test_a_head_that_nobody_reads_counts_on_neither_side() -> None:
    model, x = make(Auxiliary, depth=3), pixels()
    plain = tomepass.explain(make(depth=3), r=4, example_inputs=x)
    report = tomepass.explain(model, r=4, example_inputs=x)
    assert (report.macs_original, report.macs) == (plain.macs_original, plain.macs)
    assert report.speedup_ideal > 1
    merged = tomepass.apply(model, ToMe(macs=0.8), example_inputs=x)
    found = merged.report(x)
    assert found.macs / found.macs_original == pytest.approx(0.8, abs=0.05)
    # What nobody reads does not run either.
    graph = merged.captured(x).graph.graph
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)


def alike(model: nn.Module, inputs: Any) -> None:
    report = tomepass.explain(model, r=0, example_inputs=inputs)
    assert report.macs == report.macs_original > 0
    assert report.macs_overhead == 0


@pytest.mark.deep
@settings(
    max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(kind=kinds(), spelling=spellings())
def test_merging_nothing_saves_nothing(kind: Kind, spelling: Spelling) -> None:
    alike(build(kind, spelling), pixels())


def test_of_a_family_neither(family: str, shared_models: Any) -> None:
    alike(shared_models[family], make_inputs(family))


@pytest.mark.deep
@pytest.mark.parametrize("name", FAMILIES)
def test_of_any_family_neither(name: str, shared_models: Any) -> None:
    alike(shared_models[name], make_inputs(name))
