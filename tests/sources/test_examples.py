"""Example inputs, read off a config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from zoo import make_inputs, make_model

import tomepass
from tomepass import TomeError
from tomepass.sources.examples import example_inputs

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def test_every_family_says_what_it_takes(family: str, shared_models: dict[str, Any]) -> None:
    (found,) = example_inputs(shared_models[family], batch=3).items()
    (expected,) = make_inputs(family, batch=3).items()
    assert found[0] == expected[0]
    assert found[1].shape == expected[1].shape
    assert found[1].dtype == torch.float32


def test_they_follow_the_models_dtype_and_device() -> None:
    model = make_model("vit").to(torch.bfloat16)
    assert example_inputs(model)["pixel_values"].dtype == torch.bfloat16
    assert example_inputs(model.to("meta"))["pixel_values"].device.type == "meta"


def test_sizes_that_are_not_square() -> None:
    model = hf.ViTModel(hf.ViTConfig(**SMALL, image_size=(32, 48), patch_size=8))
    assert example_inputs(model)["pixel_values"].shape == (2, 3, 32, 48)


def test_they_are_the_same_each_time_and_leave_the_random_state() -> None:
    model, state = make_model("vit"), torch.get_rng_state()
    first, second = (example_inputs(model)["pixel_values"] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def _text() -> nn.Module:
    return hf.BertModel(hf.BertConfig(**SMALL, vocab_size=10))


def _clip() -> nn.Module:
    text = {**SMALL, "vocab_size": 10, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision))


def _video() -> nn.Module:
    return hf.VideoMAEModel(hf.VideoMAEConfig(**SMALL, image_size=32, patch_size=8, num_frames=4))


@pytest.mark.parametrize("make", [_text, _clip, _video, lambda: nn.Linear(3, 3)])
def test_what_a_config_does_not_tell_is_asked_for(make: Any) -> None:
    model = make()
    with pytest.raises(TomeError, match="give example_inputs"):
        example_inputs(model)
    with pytest.raises(TomeError, match=type(model).__name__):
        tomepass.explain(model)
    tomepass.apply(model)  # not an error: it is captured on first use
