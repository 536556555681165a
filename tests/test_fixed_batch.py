"""A batch that cannot be left open: what is said of it, how much is kept, how it is exported."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from encoders import Encoder, make, pixels
from torch import Tensor

import tomepass
from tomepass import TomeError


class CountsImages(Encoder):
    """Decides by the batch size, which no graph for every batch can."""

    def __init__(self) -> None:
        super().__init__(depth=1)

    def read(self, x: Tensor) -> Any:
        return torch.stack([super(CountsImages, self).read(row[None])[0] for row in list(x)])


class WithMeans(Encoder):
    """Its second input is as long as the batch by chance."""

    def __init__(self) -> None:
        super().__init__(depth=1)

    def forward(self, images: Tensor, mean: Tensor) -> Any:  # type: ignore[override]
        return super().forward(images - mean[:, None, None])


def test_reports_say_for_which_batch_size_and_how_many_are_kept() -> None:
    model = make(CountsImages)
    told = tomepass.explain(model, r=[4], example_inputs=pixels(3), captures=5)
    assert told.notes[0].startswith("captured for a batch of 3 alone, since torch.export cannot")
    assert "every other batch size is a capture of its own" in told.notes[0]
    assert told.notes[1] == "5 captures are kept: captures= of tomepass.apply"
    assert "captured for a batch of 3 alone" in str(told)
    merged = tomepass.apply(model, r=[4], example_inputs=pixels(3), captures=5)
    assert merged.report(pixels(3)).notes == told.notes
    assert merged.report(pixels(2)).notes[0].startswith("captured for a batch of 2 alone")
    assert tomepass.explain(make(depth=1), r=[4], example_inputs=pixels()).notes == ()


def test_no_more_captures_are_kept_than_said() -> None:
    model = make(CountsImages)
    merged = tomepass.apply(model, r=[4], captures=2)
    for batch in (1, 2, 3):
        merged(pixels(batch))
    assert sorted(a.capture.form.size for a in merged._captures) == [2, 3]
    for remade in (copy.copy(merged), pickle.loads(pickle.dumps(merged))):
        assert remade._captures.limit == 2


def test_the_adaptive_model_keeps_as_many_for_each_budget() -> None:
    images = pixels(6)
    made = tomepass.apply(
        make(depth=1), tomepass.ToMe([6], adaptive=True), example_inputs=images, captures=3
    )
    for model in (made, copy.deepcopy(made)):
        limits = [model._captures.limit, *(b._captures.limit for b in model.budgets)]
        assert limits == [3] * 4


@pytest.mark.parametrize(
    ("captures", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_what_is_no_number_of_captures_is_refused(captures: Any, error: type[Exception]) -> None:
    for entry in (tomepass.apply, tomepass.explain):
        with pytest.raises(error, match="captures must be"):
            entry(make(depth=1), r=[4], example_inputs=pixels(), captures=captures)


@torch.no_grad()
def test_a_fixed_batch_is_exported_when_asked_for_and_refused_otherwise() -> None:
    model = make(CountsImages)
    merged = tomepass.apply(model, r=[4], example_inputs=pixels(3))
    for given in (model, merged):
        with pytest.raises(TomeError, match="captured for a batch of 3 alone") as caught:
            tomepass.export(given, r=[4], example_inputs=pixels(3))
        assert "dynamic_batch=False, for a batch of 3" in str(caught.value)
    program = tomepass.export(merged, example_inputs=pixels(3), dynamic_batch=False)
    got = program.module()(pixels=pixels(3))
    torch.testing.assert_close(got, merged(pixels(3)))


@torch.no_grad()
def test_an_input_as_long_as_the_batch_by_chance_is_exported_as_it_is() -> None:
    model, mean = make(WithMeans), torch.tensor([0.1, 0.2, 0.3])
    merged = tomepass.apply(model, r=[4], example_inputs=(pixels(3), mean))
    program = tomepass.export(merged, example_inputs=(pixels(3), mean)).module()
    for batch in (3, 5):
        torch.testing.assert_close(
            program(images=pixels(batch), mean=mean), merged(pixels(batch), mean)
        )
