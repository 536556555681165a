"""`merged.tome`: all that tomepass adds to a model, under one name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from encoders import Encoder, make, pixels
from torch import Tensor

import tomepass
from tomepass import MergedModel, ToMe, TomeError
from tomepass.handover.added import Added

METHOD = ToMe([6, 4], trace_source=True)
VALUES = ("method", "original", "outputs", "on_unmatched")
TAKING_INPUTS = ("source", "kept", "kept_report", "report", "captured", "bind", "prepare")


@pytest.fixture(scope="module")
def merged() -> MergedModel:
    return tomepass.apply(make(depth=2), METHOD, example_inputs=pixels())


@pytest.fixture(scope="module")
def adaptive() -> MergedModel:
    method = ToMe([6, 4], adaptive=True)
    return tomepass.apply(make(depth=2), method, example_inputs=pixels(6))


def test_it_says_how_the_model_was_merged(merged: MergedModel) -> None:
    assert merged.tome.method == METHOD
    assert isinstance(merged.tome.original, Encoder)
    assert not isinstance(merged.tome.original, MergedModel)
    assert (merged.tome.outputs, merged.tome.on_unmatched) == ("original", "raise")
    assert merged.tome.prepare(pixels()) is merged


def test_the_plan_is_that_of_the_capture_used_last(merged: MergedModel) -> None:
    merged(pixels())
    (stream,) = merged.tome.plan
    assert (stream.tokens, stream.protected) == (37, (0,))
    assert [(b.index, b.tokens_in, b.r, b.tokens_out) for b in stream.blocks] == [
        (0, 37, 6, 31),
        (1, 31, 4, 27),
    ]
    assert merged.tome.report() == merged.tome.report(pixels())
    assert merged.tome.source(pixels()).max() == 26
    assert merged.tome.kept(pixels()).tolist() == [[31, 27]] * 2


def test_of_two_captures_the_last_one_used_is_told_of() -> None:
    merged = tomepass.apply(make(depth=1), r=2, example_inputs=pixels())
    for dtype in (torch.float64, torch.float32):
        merged.to(dtype)(pixels().to(dtype))
        told = merged.tome.report()
        assert told.inputs.startswith(f"pixels {str(dtype).removeprefix('torch.')}[")
    assert len(merged._tome.captures) == 2


def test_what_was_captured_is_forgotten_and_captured_again() -> None:
    merged = tomepass.apply(make(depth=1), r=2, example_inputs=pixels())
    before = merged(pixels())
    assert "1 capture>" in repr(merged.tome)
    merged.tome.clear()
    assert "0 captures>" in repr(merged.tome)
    with pytest.raises(TomeError, match="nothing has been captured yet"):
        merged.tome.plan  # noqa: B018
    assert torch.equal(merged(pixels()), before)
    assert "1 capture>" in repr(merged.tome)


def test_a_model_of_one_graph_is_its_own_budget(merged: MergedModel, adaptive: MergedModel) -> None:
    assert merged.tome.budgets == (merged,)
    assert merged.tome.routes(pixels(3)).tolist() == [0, 0, 0]
    assert len(adaptive.tome.budgets) == 3
    assert set(adaptive.tome.routes(pixels(6)).tolist()) <= {0, 1, 2}
    assert all(budget.tome.plan for budget in adaptive.tome.budgets)
    adaptive.tome.clear()
    assert [len(budget._tome.captures) for budget in adaptive.tome.budgets] == [0, 0, 0]


@pytest.mark.parametrize("name", [*VALUES, *TAKING_INPUTS])
def test_a_name_of_before_works_and_warns(merged: Any, name: str) -> None:
    def asked(of: Any) -> Any:
        return getattr(of, name) if name in VALUES else getattr(of, name)(pixels())

    told = rf"merged\.{name} is merged\.tome\.{name} now"
    with pytest.warns(DeprecationWarning, match=told) as warned:
        old = asked(merged)
    assert warned[0].filename == __file__
    new = asked(merged.tome)
    if isinstance(old, Tensor):
        assert torch.equal(old, new)
    elif name != "bind":
        assert old == new


@pytest.mark.parametrize("name", ["budgets", "routes"])
def test_names_of_several_graphs_work_and_warn(adaptive: Any, name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"merged\.tome\.{name} now"):
        old = adaptive.budgets if name == "budgets" else adaptive.routes(pixels(6))
    assert len(old) == (3 if name == "budgets" else 6)


def test_nothing_that_is_done_with_a_merged_model_uses_a_name_of_before(merged: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        merged(pixels())
        tomepass.explain(merged, example_inputs=pixels())
        assert "merged by tomepass" in repr(merged)
        dir(merged)


class Named(Encoder):
    """With an attribute of our name."""

    tome = "a book"
    source = "web"


def test_a_model_with_our_name_keeps_it_and_ours_is_still_there() -> None:
    with pytest.warns(UserWarning, match=r"source, tome.*tomepass's is tomepass.MergedModel.tome"):
        merged: Any = tomepass.apply(make(Named), METHOD, example_inputs=pixels())
    assert (merged.tome, merged.source) == ("a book", "web")
    ours = MergedModel.tome(merged)  # type: ignore[operator]
    assert isinstance(ours, Added)
    assert ours.method == METHOD
    assert torch.equal(ours.source(pixels()), ours.source(pixels()))
