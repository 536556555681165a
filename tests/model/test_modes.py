"""A forward that asks for settings of the process is captured for each of their answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from depth import at_hand
from encoders import Encoder, make, pixels
from test_guards import captures_made
from torch import Tensor, is_grad_enabled

import tomepass


class Asks(Encoder):
    """Goes one way or another, by what a function says of it and its tokens."""

    def __init__(self, asks: Callable[[Any, Tensor], bool]) -> None:
        super().__init__(depth=1)
        self.asks = asks

    def embed(self, pixels: Tensor) -> Tensor:
        x = super().embed(pixels)
        return x * 1.5 if self.asks(self, pixels) else x


def _helper(_model: Any, _x: Tensor) -> bool:
    return is_grad_enabled()  # imported under a name of its own


def _under_no_grad(_model: Any, _x: Tensor) -> bool:
    before = torch.is_grad_enabled()
    with torch.no_grad():
        return before and not torch.is_grad_enabled()


ASKS: dict[str, Callable[[Any, Tensor], bool]] = {
    "is_grad_enabled": lambda _m, _x: torch.is_grad_enabled(),
    "a helper": _helper,
    "no_grad inside": _under_no_grad,
    "a weight wants gradients": lambda m, _x: m.head.weight.requires_grad,
    "a result wants gradients": lambda m, x: m.patches(x).requires_grad,
    "a result has a history": lambda m, x: m.patches(x).grad_fn is not None,
    "an input wants gradients": lambda _m, x: x.requires_grad,
    "is_inference_mode_enabled": lambda _m, _x: torch.is_inference_mode_enabled(),
    "is_autocast_enabled": lambda _m, _x: torch.is_autocast_enabled("cpu"),
    "get_autocast_dtype": lambda _m, _x: torch.get_autocast_dtype("cpu") is torch.float16,
    "get_default_dtype": lambda _m, _x: torch.get_default_dtype() is torch.float64,
    "deterministic": lambda _m, _x: torch.are_deterministic_algorithms_enabled(),
    "matmul precision": lambda _m, _x: torch.get_float32_matmul_precision() == "high",
    "sdp kernels": lambda _m, _x: torch.backends.cuda.math_sdp_enabled(),
}


@contextlib.contextmanager
def _setting(change: Callable[[Any], Any], there: Any, back: Any) -> Iterator[None]:
    change(there)
    try:
        yield
    finally:
        change(back)


def _nothing(_model: Any) -> Any:
    return contextlib.nullcontext()


SETTINGS: dict[str, Callable[[Any], Any]] = {
    "grad": _nothing,
    "no_grad": lambda _m: torch.no_grad(),
    "inference": lambda _m: torch.inference_mode(),
    "frozen": lambda m: _setting(lambda on: m.requires_grad_(on), False, True),
    "autocast": lambda _m: torch.autocast("cpu", dtype=torch.bfloat16),
    "half autocast": lambda _m: torch.autocast("cpu", dtype=torch.float16),
    "deterministic": lambda _m: _setting(torch.use_deterministic_algorithms, True, False),
    "high": lambda _m: _setting(torch.set_float32_matmul_precision, "high", "highest"),
    "no math": lambda _m: _setting(torch.backends.cuda.enable_math_sdp, False, True),
}
# Which settings each is answered otherwise under.
TOLD = {
    "is_grad_enabled": ["no_grad", "inference"],
    "a helper": ["no_grad"],
    "no_grad inside": ["no_grad"],
    "a weight wants gradients": ["frozen"],
    "a result wants gradients": ["no_grad", "frozen"],
    "a result has a history": ["no_grad"],
    "is_inference_mode_enabled": ["inference"],
    "is_autocast_enabled": ["autocast"],
    "get_autocast_dtype": ["half autocast"],
    "deterministic": ["deterministic"],
    "matmul precision": ["high"],
    "sdp kernels": ["no math"],
}
EVERY_TIME = ["is_grad_enabled", "a helper", "a result wants gradients", "is_autocast_enabled"]


@pytest.mark.parametrize("name", at_hand(TOLD, EVERY_TIME))
def test_the_answer_is_that_of_the_model_under_each_setting(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(lambda: Asks(ASKS[name]))
    merged = tomepass.apply(model, r=0, example_inputs=pixels())
    made = captures_made(monkeypatch)
    plain = model(pixels()).detach()
    for setting in [*TOLD[name], "grad", *TOLD[name]]:
        with SETTINGS[setting](model):
            expected = model(pixels())
            got = merged(pixels())
        assert got.dtype == expected.dtype
        close = 0.02 if "autocast" in setting else 1e-5
        torch.testing.assert_close(got, expected, rtol=close, atol=close * float(plain.abs().max()))
        moved = float((expected.detach() - plain).abs().max() / plain.abs().max())
        assert (moved > 0.05) == (setting != "grad"), "the settings must be told apart"
    assert len(made) <= len(TOLD[name]), "a setting seen before is not captured again"


def test_an_input_that_wants_gradients_is_asked_too() -> None:
    model = make(lambda: Asks(ASKS["an input wants gradients"]))
    merged = tomepass.apply(model, r=0, example_inputs=pixels())
    for wants in (False, True, False, True):
        x = pixels().requires_grad_(wants)
        torch.testing.assert_close(merged(x), model(x))
    assert len(merged._captures) == 2


def test_merged_tokens_follow_the_setting_too() -> None:
    model = make(lambda: Asks(ASKS["is_grad_enabled"]))
    merged = tomepass.apply(model, r=[6], example_inputs=pixels())
    with torch.no_grad():
        fresh = tomepass.apply(model, r=[6], example_inputs=pixels())(pixels())
        assert torch.equal(merged(pixels()), fresh)
    assert not torch.allclose(merged(pixels()), fresh, rtol=0.05)


def test_a_model_that_asks_nothing_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(depth=1)
    merged = tomepass.apply(model, r=[6], example_inputs=pixels())
    made = captures_made(monkeypatch)
    for setting in ("grad", "no_grad", "inference", "frozen", "deterministic", "high"):
        with SETTINGS[setting](model):
            merged(pixels())
    merged(pixels().requires_grad_())
    assert not made


def test_torchs_functions_are_its_own_again() -> None:
    before = torch.is_grad_enabled
    tomepass.apply(make(lambda: Asks(ASKS["a helper"])), r=0, example_inputs=pixels())
    assert torch.is_grad_enabled is before
    assert is_grad_enabled is before
