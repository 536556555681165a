"""Each kind of error is a class of its own, and a TomeError."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from encoders import make, pixels
from torch import nn

import tomepass
from tomepass import NotCaptured, NotExported, NotTrained, Refused, ToMe, TomeError
from tomepass.capture.fidelity import NotCapturedError
from tomepass.handover.captures import NotPreparedError

KINDS = (NotCaptured, Refused, NotTrained, NotExported)


class Branching(nn.Module):
    """Branches on a value, which no graph can hold."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values if pixel_values.sum() > 0 else -pixel_values


class Towers(nn.Module):
    """Two encoders of unequal depth side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.shallow = make(depth=3), make(depth=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.deep(pixel_values) + self.shallow(pixel_values)


def applied(model: nn.Module, *method: Any, **options: Any) -> Callable[[], object]:
    return lambda: tomepass.apply(model.eval(), *method, example_inputs=pixels(), **options)


RAISED: dict[str, tuple[type[TomeError], Callable[[], object]]] = {
    "branches on values": (NotCaptured, applied(Branching(), r=2)),
    "no tensor": (
        NotCaptured,
        lambda: tomepass.apply(nn.Identity(), r=2, example_inputs={"input": 7}),
    ),
    "nothing to merge": (Refused, applied(nn.Flatten(), r=2)),
    "merged already": (Refused, lambda: tomepass.apply(applied(make(depth=1), r=2)(), r=2)),  # type: ignore[arg-type]
    "out of reach": (Refused, applied(make(depth=1), ToMe(macs=0.01))),
    "several graphs": (
        Refused,
        lambda: tomepass.check(make(depth=1), pixels(), ToMe(2, adaptive=True)),
    ),
    "no policy": (NotTrained, applied(make(depth=1), tomepass.DynamicViT(keep_rate=0.5))),
    "too many counts": (Refused, applied(make(depth=1), r=[1, 1])),
    "no such block": (Refused, applied(make(depth=1), ToMe(2, blocks=(4,)))),
    "no such block, shares": (Refused, applied(make(depth=1), ToMe(macs=0.9, blocks=(4,)))),
    "not as deep": (
        Refused,
        applied(make(depth=1), tomepass.DiffRate(2, pruned=(0.5, 0.5))),
    ),
    "in training mode": (
        NotExported,
        lambda: tomepass.export(make(depth=1).train(), r=2, example_inputs=pixels()),
    ),
    "a source map": (
        NotExported,
        lambda: tomepass.export(make(depth=1), ToMe(2, trace_source=True), example_inputs=pixels()),
    ),
}


@pytest.mark.parametrize("fault", RAISED)
def test_an_error_is_of_its_kind_and_of_no_other(fault: str) -> None:
    kind, raising = RAISED[fault]
    with pytest.raises(kind) as raised:
        raising()
    assert [k for k in KINDS if isinstance(raised.value, k)] == [kind]


@pytest.mark.parametrize(
    "fault", [f for f, (kind, _) in RAISED.items() if "counts" in f or "block" in f]
)
def test_counts_for_more_blocks_are_a_value_error_too(fault: str) -> None:
    with pytest.raises(ValueError, match="its one stream takes 37 tokens through 1 blocks"):
        RAISED[fault][1]()


def test_of_several_streams_the_one_is_named_that_is_too_short() -> None:
    model = Towers().eval()
    assert [len(s.blocks) for s in tomepass.explain(model, r=1, example_inputs=pixels()).streams]
    for ask in (tomepass.apply, tomepass.explain):
        with pytest.raises(Refused, match=r"stream (0|1) of 2 takes 37 tokens through 1 blocks"):
            ask(model, r=[1, 1], example_inputs=pixels())


def test_the_backend_raises_counts_that_do_not_fit_in_any_case() -> None:
    backend = tomepass.TomeBackend(ToMe([1, 1]), inner="eager", on_unmatched="warn")
    torch._dynamo.reset()
    with pytest.raises(Exception, match="through 1 blocks"), torch.no_grad():
        torch.compile(make(depth=1), backend=backend, fullgraph=True)(pixels())


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_travels_as_what_it_is(kind: type[TomeError]) -> None:
    error = kind("no", block=1, advice="yes")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (kind, str(error))


def test_an_error_that_holds_more_travels_as_its_kind() -> None:
    with pytest.raises(NotCapturedError) as raised:
        RAISED["branches on values"][1]()
    again = pickle.loads(pickle.dumps(raised.value))
    assert (type(again), str(again)) == (NotCaptured, str(raised.value))
    assert type(pickle.loads(pickle.dumps(NotPreparedError("no")))) is NotCaptured


def test_what_is_none_of_the_kinds_is_a_plain_one() -> None:
    with pytest.raises(TomeError, match="eval mode") as raised:
        tomepass.check(make(depth=1).train(), pixels(), r=2)
    assert type(raised.value) is TomeError
