"""Which fused layers leave out modules that stand in them: as PyTorch's own layer decides."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tomepass
from tomepass import TomeError
from tomepass.model.fast_paths import refuse_skipped_modules


class Adapted(nn.Linear):
    """A linear layer with something added to it, as adapters are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


class OtherNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


def layer(part: str | None = "linear1", **choices: Any) -> Any:
    """A layer of PyTorch's own, one part of which is another."""
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True} | choices
    first, second = options.pop("eps", (1e-5, 1e-5))
    made = nn.TransformerEncoderLayer(8, 2, 16, **options).eval()
    made.norm1.eps, made.norm2.eps = first, second
    if part is not None:
        old = getattr(made, part)
        new = OtherNorm(8, eps=old.eps) if part[:4] == "norm" else Adapted(*old.weight.shape[::-1])
        new.load_state_dict(old.state_dict())
        setattr(made, part, new)
    return made.requires_grad_(False)


@contextlib.contextmanager
def _nothing(_made: Any) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _no_fast_path(_made: Any) -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def _autocast(_made: Any) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@contextlib.contextmanager
def _training(made: Any) -> Iterator[None]:
    made.train()
    yield
    made.eval()


@contextlib.contextmanager
def _wanting_gradients(made: Any) -> Iterator[None]:
    made.requires_grad_(True)
    yield
    made.requires_grad_(False)


@contextlib.contextmanager
def _wanting_one_gradient(made: Any) -> Iterator[None]:
    made.self_attn.in_proj_bias.requires_grad_(True)
    yield
    made.requires_grad_(False)


@contextlib.contextmanager
def _hooked(made: Any) -> Iterator[None]:
    handle = made.linear2.register_forward_hook(lambda *_: None)
    yield
    handle.remove()


SETTINGS: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "as it is": ({}, _nothing),
    "relu": ({"activation": "relu"}, _nothing),
    "gelu, norms first": ({"activation": "gelu", "norm_first": True}, _nothing),
    "another activation": ({"activation": torch.tanh}, _nothing),
    "batch second": ({"batch_first": False}, _nothing),
    "no bias": ({"bias": False}, _nothing),
    "fast path off": ({}, _no_fast_path),
    "autocast": ({}, _autocast),
    "eps of the norms": ({"eps": (1e-5, 1e-3)}, _nothing),
    "training": ({}, _training),
    "gradients": ({}, _wanting_gradients),
    "gradients of one bias": ({}, _wanting_one_gradient),
    "a hook": ({}, _hooked),
}


def ignored(made: Any, part: str) -> bool:
    """Does the layer itself leave the module out?"""
    called = []
    handle = getattr(made, part).forward
    getattr(made, part).forward = lambda x: (called.append(part), handle(x))[1]
    try:
        made(torch.randn(2, 5, 8))
    finally:
        del getattr(made, part).forward
    return not called


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_the_layer_itself_leaves_out_is_refused_and_nothing_else(setting: str) -> None:
    choices, under = SETTINGS[setting]
    for part in ("linear1", "norm2"):
        made = layer(None if choices.get("bias") is False else part, **choices)
        if choices.get("bias") is False:
            new = Adapted(8, 16, bias=False) if part == "linear1" else OtherNorm(8, bias=False)
            setattr(made, part, new.requires_grad_(False))
        with under(made):
            if ignored(made, part):
                with pytest.raises(TomeError, match="one fused operator, which reads weights"):
                    refuse_skipped_modules(nn.Sequential(made))
            else:
                refuse_skipped_modules(nn.Sequential(made))


def test_both_answers_occur() -> None:
    assert ignored(layer(), "linear1")
    assert not ignored(layer(activation=torch.tanh), "linear1")


def test_plain_layers_and_other_models_pass() -> None:
    refuse_skipped_modules(nn.TransformerEncoder(layer(None), 2))
    refuse_skipped_modules(nn.Sequential(Adapted(8, 8), OtherNorm(8)))


def test_the_message_names_the_layer_and_what_it_leaves_out_and_the_advice_works() -> None:
    model = nn.Sequential(nn.Identity(), layer("linear2"))
    x = torch.randn(2, 5, 8)
    with pytest.raises(TomeError, match=r"^1 runs as one fused operator.*test_fast_paths\.Adapted"):
        tomepass.apply(model, r=0, example_inputs=x)
    with _no_fast_path(model):
        merged = tomepass.apply(model, tomepass.ToMe(0, protected=()), example_inputs=x)
        torch.testing.assert_close(merged(x), model(x))
