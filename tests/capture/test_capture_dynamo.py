"""A graph of Dynamo's that cannot be read: what is raised or warned of, and what runs then."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from depth import at_hand
from encoders import Encoder, make, pixels
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import tomepass
from tomepass import ToMe, TomeBackend, TomeError
from tomepass.capture import dialect, dynamo
from tomepass.handover.compiling import backend

RAISING = TomeBackend(ToMe(4), inner="eager")
WARNING = dataclasses.replace(RAISING, on_unmatched="warn")
# Where reading may fail: each is a function that a step of it calls.
STEPS = {
    "lifting inputs": (dynamo, "_as_fake"),
    "tracing": (dynamo, "make_fx"),
    "operators": (dynamo.Inlining, "run_node"),
    "names of placeholders": (dynamo, "placeholders"),
    "the dialect": (dialect, "merge_duplicates"),
    "looking for attention": (backend, "has_attention"),
    "sizes": (backend, "fix_sizes"),
    "planning": (backend, "plan_graph"),
    "rewriting": (backend, "rewrite"),
    "reporting": (backend, "make_report"),
}


def told(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "merged" in str(w.message)]


def raised(model: Any) -> TomeError:
    with pytest.raises(BackendCompilerFailed) as failed:
        torch.compile(model, backend=RAISING)(pixels())
    error = failed.value.inner_exception
    assert isinstance(error, TomeError)
    return error


def left_unmerged(model: Any) -> str:
    """What is warned of; the compiled model then is the model, at two batch sizes."""
    compiled = torch.compile(model, backend=WARNING, dynamic=False)
    answers: list[Any] = []
    (said,) = told(lambda: answers.extend(compiled(pixels(batch)) for batch in (2, 3)))
    assert torch.equal(answers[0], model(pixels()))
    reports = WARNING.reports(model)
    assert len(reports) == 2
    assert not any(report.ok for report in reports)
    assert all(report.refused for report in reports)
    assert str(reports[0])
    return said


@pytest.mark.parametrize("step", at_hand(STEPS, ["lifting inputs", "operators", "sizes"]))
def test_whatever_fails_is_told_and_the_model_runs(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise KeyError("something nobody foresaw")

    monkeypatch.setattr(*STEPS[step], fails)
    model = make(depth=1)
    error = raised(model)
    assert error.reason.startswith("tomepass could not read a graph of Dynamo's: ")
    assert "something nobody foresaw" in str(error.__cause__)
    torch._dynamo.reset()
    assert "something nobody foresaw" in left_unmerged(model)


class ReplacesData(Encoder):
    def read(self, x: Tensor) -> Any:
        self.head.weight.data = self.head.weight.data * 1.0
        return super().read(x)


class MakesNested(Encoder):
    """What Dynamo can trace and pre-dispatch tracing cannot."""

    def read(self, x: Tensor) -> Any:
        rows, places = x.flatten(0, 1), torch.tensor([0, 3, x.shape[0] * x.shape[1]])
        jagged = torch.nested.nested_tensor_from_jagged(rows, places)
        return super().read(jagged.to_padded_tensor(0.0))


@pytest.mark.parametrize("cls", [ReplacesData, MakesNested])
def test_models_that_cannot_be_read_are_left_unmerged(cls: type[Encoder]) -> None:
    model = make(cls, depth=1)
    reason = raised(model).reason
    torch._dynamo.reset()
    assert reason.splitlines()[0][:60] in left_unmerged(model)


class Broken(Encoder):
    """Graph breaks before and behind its blocks: three graphs."""

    def read(self, x: Tensor) -> Any:
        torch._dynamo.graph_break()
        return super().read(x)


def test_one_fault_in_many_graphs_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise KeyError("the same")

    monkeypatch.setattr(dynamo, "make_fx", fails)
    model = make(Broken, depth=1)
    compiled = torch.compile(model, backend=WARNING)
    assert len(told(lambda: compiled(pixels()))) == 1
    assert len(WARNING.reports(model)) > 1


def test_a_merged_model_is_refused_even_where_others_are_let_pass() -> None:
    merged = tomepass.apply(make(depth=1), r=4, example_inputs=pixels())
    with pytest.raises(BackendCompilerFailed, match="already merged"):
        torch.compile(merged, backend=WARNING)(pixels())


class Decides(Encoder):
    """Its classes go through one branch of two, which reads a parameter."""

    def read(self, x: Tensor) -> Any:
        y = super().read(x)
        by = self.head.bias
        return torch.cond(y.sum() > -1e9, lambda y: y * 2 + by, lambda y: y - 1, (y,))


@torch.no_grad()
@pytest.mark.parametrize("door", ["apply", "backend"])
def test_a_branch_behind_the_blocks_is_carried_along(door: str) -> None:
    model, plain = make(Decides), make()
    expected = tomepass.apply(plain, r=4, example_inputs=pixels())(pixels()) * 2 + plain.head.bias
    if door == "apply":
        got = tomepass.apply(model, r=4, example_inputs=pixels())(pixels())
    else:
        got = torch.compile(model, backend=RAISING)(pixels())
    torch.testing.assert_close(got, expected)
