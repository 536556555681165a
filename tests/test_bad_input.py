"""Wrong input is said clearly, and nothing is changed by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from zoo import make_inputs, make_model

import tomepass
from tomepass import ToMe, TomeError


@pytest.mark.parametrize(
    ("r", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), ([1] * 4, ValueError)]
)
def test_a_wrong_r_is_refused_by_every_door(r: Any, error: type[Exception]) -> None:
    model = make_model("vit")
    for door in (tomepass.apply, tomepass.explain):
        with pytest.raises(error):
            door(model, r=r)
    with pytest.raises(error):
        tomepass.check(model, make_inputs("vit"), r=r, inner="eager")


def test_r_and_method_together_are_refused() -> None:
    model = make_model("vit")
    for door in (tomepass.apply, tomepass.explain):
        with pytest.raises(TypeError, match="not both"):
            door(model, ToMe(r=2), r=2)


def _decoder() -> tuple[nn.Module, Any]:
    config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=50)
    return hf.GPT2Model(config), {"input_ids": torch.randint(50, (2, 16)), "use_cache": False}


def _swin() -> tuple[nn.Module, Any]:
    config = hf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2])
    return hf.SwinModel(config), torch.randn(2, 3, 32, 32)


def _sam() -> tuple[nn.Module, Any]:
    config = hf.SamVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8,
        window_size=4, global_attn_indexes=[1], output_channels=8, mlp_dim=64,
    )  # fmt: skip
    return hf.SamVisionModel(config), torch.randn(2, 3, 64, 64)


def _convolutional() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_convolutional, "holds no attention"),
        (_decoder, "causal|mask"),
        pytest.param(_swin, "window|written out as matmul|all tokens", marks=pytest.mark.deep),
        pytest.param(
            *(_sam, "window|written out as matmul|all tokens|one sequence"), marks=pytest.mark.deep
        ),
    ],
)
def test_a_model_that_cannot_be_merged_is_refused_or_left_whole(make: Any, reason: str) -> None:
    model, inputs = make()
    model.eval()
    with pytest.raises(TomeError, match=reason):
        tomepass.apply(model, r=4, example_inputs=inputs)
    report = tomepass.explain(model, r=4, example_inputs=inputs)
    assert not report.ok
    assert report.refused
    with pytest.warns(UserWarning, match="left unmerged") as caught:
        merged = tomepass.apply(model, r=4, example_inputs=inputs, on_unmatched="warn")
    assert len([w for w in caught if "left unmerged" in str(w.message)]) == 1
    call = inputs if isinstance(inputs, dict) else {}
    args = () if call else (inputs,)
    with torch.no_grad():
        ours, theirs = merged(*args, **call), model(*args, **call)
    first = [o if isinstance(o, torch.Tensor) else o[0] for o in (ours, theirs)]
    assert torch.equal(*first)


def test_a_refusal_names_block_node_source_line_and_advice() -> None:
    model, inputs = _decoder()
    with pytest.raises(TomeError) as caught:
        tomepass.apply(model.eval(), r=4, example_inputs=inputs)
    error = caught.value
    assert error.block == 0
    assert error.node is not None
    assert error.source is not None
    assert "modeling_gpt2.py" in error.source or "sdpa_attention.py" in error.source
    assert error.advice is not None


@pytest.mark.parametrize("shape", [(2, 3, 30, 32), (2, 1, 32, 32), (2, 3, 32)])
def test_an_input_of_the_wrong_size_or_rank_is_said_with_its_shape(shape: tuple[int, ...]) -> None:
    merged = tomepass.apply(make_model("vit"), r=4)
    with pytest.raises(TomeError, match=str(list(shape)).replace("[", r"\[").replace("]", r"\]")):
        merged(torch.randn(shape))
    assert merged(**make_inputs("vit")).logits.shape == (2, 10), "still works afterwards"


def test_a_dtype_the_device_cannot_run_is_said() -> None:
    model = make_model("vit")
    with pytest.raises((TomeError, RuntimeError, NotImplementedError), match=r"(?i)float8|dtype"):
        tomepass.apply(model.to(torch.float8_e4m3fn), r=4)


def test_check_in_training_mode_is_refused() -> None:
    with pytest.raises(TomeError, match="eval mode"):
        tomepass.check(make_model("vit").train(), make_inputs("vit"), r=4, inner="eager")


def test_a_refused_model_is_left_as_it_was() -> None:
    model, inputs = _swin()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = set(vars(model))
    with pytest.raises(TomeError):
        tomepass.apply(model.eval(), r=4, example_inputs=inputs)
    assert set(vars(model)) == attributes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
