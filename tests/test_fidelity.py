"""On which inputs a capture is held against the model, and what is said where there are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from encoders import Encoder, make, pixels
from torch import Tensor

import tomepass
from tomepass import TomeError


class Takes(Encoder):
    """Raises on some inputs where they have values; followed, it is another function if told."""

    def __init__(self, takes: Callable[[Tensor], bool], factor: float = 1.0) -> None:
        super().__init__(depth=1)
        self.takes, self.factor = takes, factor

    def embed(self, pixels: Tensor) -> Tensor:
        followed = torch.compiler.is_compiling()
        if not followed and not self.takes(pixels):
            raise ValueError(f"not a batch of {pixels.shape[0]}")
        return super().embed(pixels) * (self.factor if followed else 1.0)


ONLY: dict[str, Callable[[Tensor], bool]] = {
    "two": lambda x: x.shape[0] == 2,
    "all": lambda x: x.shape[0] == 5,
    "one": lambda x: x.shape[0] == 1,
}


@pytest.mark.parametrize("only", ONLY)
def test_a_capture_is_compared_on_as_many_as_the_model_takes(only: str) -> None:
    model = make(lambda: Takes(ONLY[only], factor=1.5))
    with pytest.raises(TomeError, match="is another function"):
        tomepass.apply(model, r=0, example_inputs=pixels(5))
    model.factor = 1.0
    report = tomepass.explain(model, r=0, example_inputs=pixels(5))
    assert report.notes == ()


def test_where_nothing_can_be_compared_the_report_says_so() -> None:
    model = make(lambda: Takes(lambda _: False))
    merged = tomepass.apply(model, r=[4], example_inputs=pixels(5))
    (note,) = merged.report(pixels(5)).notes
    assert "could not be compared with the model, which raises on these inputs" in note
    assert "(ValueError: not a batch of 5)" in note
    assert "could not be compared" in " ".join(str(merged.report(pixels(5))).split())
    assert merged.report(pixels(5)).to_dict()["notes"] == (note,)


def test_the_first_real_inputs_settle_it() -> None:
    """Captured ahead on inputs that the model does not take, then called with others."""
    model = make(lambda: Takes(lambda x: bool(x.mean() > 0.5), factor=1.5))
    merged: Any = tomepass.apply(model, r=0, example_inputs=pixels(2))
    assert len(merged._captures._all()[0].applied.report.notes) == 1
    with pytest.raises(TomeError, match="is another function"):
        merged(pixels(2) + 1)
    model.factor = 1.0
    merged = tomepass.apply(model, r=0, example_inputs=pixels(2))
    merged(pixels(2) + 1)
    assert merged.report(pixels(2) + 1).notes == ()
