"""Whatever is given: a TomeError with its cause, or an error about an argument; nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from depth import in_turn
from encoders import Causal, make, near, pixels
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import tomepass
from tomepass import ToMe, TomeBackend, TomeError
from tomepass.errors import no_foreign_errors, the_users_own
from tomepass.handover import applied, applying
from tomepass.handover.compiling import backend
from tomepass.proof import check as equivalence

Entry = Callable[[nn.Module, Any], Any]


def _compiled(model: nn.Module, inputs: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=TomeBackend(ToMe(4), inner="eager"))(inputs)


ENTRIES: dict[str, Entry] = {
    "apply": lambda model, x: tomepass.apply(model, r=4, example_inputs=x),
    "call": lambda model, x: tomepass.apply(model, r=4)(x),
    "explain": lambda model, x: tomepass.explain(model, r=4, example_inputs=x),
    "check": lambda model, x: tomepass.check(model, x, r=4, inner="eager"),
    "export": lambda model, x: tomepass.export(model, r=4, example_inputs=x),
    "backend": _compiled,
}
IMAGES = pixels()
ODD: dict[str, Any] = {
    "number": 3,
    "text": "abc",
    "empty dict": {},
    "empty tuple": (),
    "nested": {"pixels": {"a": IMAGES}},
    "key that is no name": {0: IMAGES},
    "0-d": torch.tensor(1.0),
    "sparse": IMAGES.to_sparse(),
    "mkldnn": IMAGES.to_mkldnn(),
    "complex": IMAGES.to(torch.complex64),
    "integers": IMAGES.long(),
    "float8": IMAGES.to(torch.float8_e4m3fn),
    "unbatched": IMAGES[0],
    "channels": torch.ones(2, 4, 24, 24),
    "too small": torch.ones(2, 3, 2, 2),
    "no width": torch.ones(2, 3, 24, 0),
    "too many": (IMAGES, IMAGES),
    "another name": {"images": IMAGES},
    "nothing": {"pixels": None},
    "NumPy": IMAGES.numpy(),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return make()


@pytest.mark.parametrize(("entry", "odd"), in_turn(["apply", "explain", "export"], ODD))
def test_odd_inputs_are_told_by_an_error_of_ours(entry: str, odd: str, model: Any) -> None:
    inputs = ODD[odd]
    with pytest.raises((TomeError, TypeError)) as caught:
        ENTRIES[entry](model, inputs)
    assert "fault of tomepass" not in str(caught.value)


@pytest.mark.parametrize("kind", ["sparse", "mkldnn"])
def test_what_is_not_dense_is_told(kind: str, model: Any) -> None:
    with pytest.raises(TomeError, match=rf"expected dense tensors.*{kind}"):
        tomepass.apply(model, r=4, example_inputs=ODD[kind])


class Broken(RuntimeError):
    """Stands for what nobody foresaw."""


def broken(*args: Any, **kwargs: Any) -> Any:
    raise Broken("no idea")


# Where each entry goes through each stage.
STAGES = [
    (applied, "plan_graph", ("call", "explain", "check", "export")),
    (applied, "rewrite", ("apply",)),
    (applied, "make_report", ("explain",)),
    (applied, "take_fastest_attention", ("apply",)),
    (applying, "inputs_from_config", ("call",)),
    (equivalence, "record", ("check",)),
    (backend, "capture_dynamo", ("backend",)),
    (backend, "plan_graph", ("backend",)),
    (backend, "rewrite", ("backend",)),
    (backend, "take_fastest_attention", ("backend",)),
    (backend, "carry_marks", ("backend",)),
]


@pytest.mark.usefixtures("shared_models")
@pytest.mark.parametrize(
    ("home", "stage", "entry"), [(home, stage, e) for home, stage, es in STAGES for e in es]
)
def test_an_error_nobody_foresaw_becomes_ours_with_its_cause(
    home: Any, stage: str, entry: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home, stage, broken)
    with pytest.raises((TomeError, BackendCompilerFailed)) as caught:
        ENTRIES[entry](model, IMAGES)
    error: Any = caught.value
    if entry == "backend":
        assert "Broken: no idea" in str(error), "Dynamo's wrapping keeps it readable"
        error = error.inner_exception
    assert isinstance(error, TomeError)
    assert "Broken: no idea" in error.reason
    assert "fault of tomepass" in str(error)
    assert isinstance(error.__cause__, Broken)


def test_what_the_inner_backend_raises_on_a_merged_graph_is_told(model: Any) -> None:
    compiled = torch.compile(model, backend=TomeBackend(ToMe(4), inner=broken))
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(IMAGES)
    inside: Any = caught.value.inner_exception
    assert isinstance(inside, TomeError)
    assert isinstance(inside.__cause__, Broken)
    assert "compile the model itself with that backend first" in str(inside)


@pytest.mark.usefixtures("shared_models")
def test_check_tells_what_the_backend_raised(model: Any) -> None:
    with pytest.raises(TomeError, match="no idea"):
        tomepass.check(model, IMAGES, r=4, inner=broken)


# What passes as it is


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError("full"), SystemExit()]
)
def test_what_is_no_fault_passes(error: BaseException) -> None:
    with pytest.raises(type(error)), no_foreign_errors("do it"):
        raise error


def test_the_allocator_of_the_cpu_passes() -> None:
    with (
        pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught,
        no_foreign_errors("do it"),
    ):
        torch.empty(1 << 60)
    assert not isinstance(caught.value, TomeError)


def test_errors_about_arguments_pass_and_those_of_python_do_not() -> None:
    with pytest.raises(ValueError, match="r lists"), no_foreign_errors("do it"):
        ToMe(r=[1, 2]).plan(36, (0,), 1)
    with pytest.raises(TomeError, match="could not do it: TypeError"), no_foreign_errors("do it"):
        torch.relu("text")  # type: ignore[arg-type]
    with pytest.raises(TomeError, match="could not do it: ValueError"), no_foreign_errors("do it"):
        int("text")


def test_errors_of_the_users_own_code_pass() -> None:
    with pytest.raises(Broken), no_foreign_errors("do it"), the_users_own():
        broken()


def test_a_tome_error_passes_as_it_is() -> None:
    error = TomeError("said", block=3)
    with pytest.raises(TomeError) as caught, no_foreign_errors("do it"):
        raise error
    assert caught.value is error


def test_a_refusal_is_no_fault_of_ours() -> None:
    with pytest.raises(TomeError) as caught:
        tomepass.apply(make(blocks=[near(Causal)]), r=4, example_inputs=IMAGES)
    assert "causal" in str(caught.value)
    assert caught.value.__cause__ is None
