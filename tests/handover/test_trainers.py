"""Trainer, accelerate and PEFT take a merged model for the model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import Encoder, make, pixels
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import make_inputs, make_model, relative_error

import tomepass
from tomepass import ToMe

FEW = [8]


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    """HuggingFace's Trainer over eight images with labels, for two steps."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    images = make_inputs("vit", 8)["pixel_values"]
    data = [{"pixel_values": image, "labels": i % 5, "path": "x"} for i, image in enumerate(images)]
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no"}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **quiet, **options})
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda found: {"seen": float(found.predictions.shape[0])},
    )


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def test_trainer_trains_evaluates_and_predicts(tmp_path: Path) -> None:
    plain = trainer(make_model("vit"), tmp_path / "plain")
    plain.train()
    options = {"save_strategy": "steps", "save_steps": 1}
    whole = trainer(tomepass.apply(make_model("vit"), r=0), tmp_path / "whole", **options)
    whole.train()
    assert losses(whole) == pytest.approx(losses(plain), rel=1e-5)
    assert whole.label_names == plain.label_names == ["labels"]
    for mine, theirs in zip(whole.model.parameters(), plain.model.parameters(), strict=True):
        assert relative_error(mine, theirs) < 1e-3
    expected, found = plain.evaluate(), whole.evaluate()
    assert found["eval_seen"] == expected["eval_seen"] == 8
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    predicted = whole.predict(whole.eval_dataset)
    assert predicted.predictions.shape == (8, 10)
    saved = tmp_path / "whole" / "checkpoint-1"
    assert {"config.json", "tomepass.json"} <= {path.name for path in saved.iterdir()}


@pytest.mark.deep
def test_trainer_resumes(tmp_path: Path) -> None:
    """As the model itself does, whose renamed weights a Trainer of transformers 5.23 leaves out."""
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer(tomepass.apply(make_model("vit"), r=0), tmp_path / "whole", **options).train()
    saved = tmp_path / "whole" / "checkpoint-1"
    other = make_model("vit", seed=1), tomepass.apply(make_model("vit", seed=1), r=0)
    runs = [trainer(model, tmp_path / "again") for model in other]
    for run in runs:
        run.train(resume_from_checkpoint=str(saved))
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4)


def test_trainer_saves_what_load_reads(tmp_path: Path) -> None:
    merged = tomepass.apply(make_model("vit"), r=FEW)
    trainer(merged, tmp_path).save_model(str(tmp_path / "saved"))
    again = tomepass.load(tmp_path / "saved")
    assert again.method == ToMe(FEW)
    x = make_inputs("vit")["pixel_values"]
    assert torch.equal(again(x).logits, merged.eval()(x).logits)


@pytest.mark.deep
def test_trainer_with_gradient_checkpointing_gives_the_same_losses(tmp_path: Path) -> None:
    found = [
        losses(run)
        for options in ({}, {"gradient_checkpointing": True})
        if (run := trainer(tomepass.apply(make_model("vit"), r=FEW), tmp_path, **options)).train()
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


# Gradient checkpointing


class Recomputed(Encoder):
    """Recomputes its blocks as it is told, with dropout in them."""

    how: dict[str, Any] | None = None

    def forward(self, pixels: Tensor) -> Any:
        x = self.embed(pixels)
        for number, block in enumerate(self.blocks):
            if self.how is None or (self.how.get("second") and number % 2):
                x = nn.functional.dropout(block(x), 0.1, self.training)
            else:
                x = checkpoint(self.dropped, block, x, use_reentrant=self.how["reentrant"])
        return self.read(self.final(x))

    def dropped(self, block: nn.Module, x: Tensor) -> Tensor:
        return nn.functional.dropout(block(x), 0.1, self.training)


def backward(module: Any, x: Tensor) -> tuple[int, list[Tensor]]:
    """Bytes kept for the backward, and gradients."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    module(x)  # what is captured is no part of it
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module(x).square().sum()
    loss.backward()
    return sum(kept.values()), [p.grad for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_the_model_recomputes_is_recomputed(reentrant: bool) -> None:
    x, model = pixels(4), make(Recomputed, depth=4).train()
    merged = tomepass.apply(model, r=2, example_inputs=x)
    whole, gradients = backward(merged, x)
    model.how = {"reentrant": reentrant}
    merged.zero_grad()
    few, same = backward(merged, x)
    assert few < whole / 2
    assert len(same) == len(gradients)
    assert all(torch.equal(a, b) for a, b in zip(same, gradients, strict=True))
    model.how["second"] = True
    model.how = dict(model.how)
    merged.zero_grad()
    between, same = backward(merged, x)
    assert few < between < whole
    assert all(torch.equal(a, b) for a, b in zip(same, gradients, strict=True))
    with torch.no_grad():
        merged.eval()(x)


def test_a_compiled_region_recomputes_too() -> None:
    x, model = pixels(4), make(depth=3).train()
    made = Recomputed(depth=3)
    made.load_state_dict(model.state_dict())
    made.how = {"reentrant": False}
    merged = tomepass.apply(made, r=2, example_inputs=x)
    graphs: list[Any] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compile(merged, backend=keep, fullgraph=True)(x)
    regions = [n for n in graphs[0].graph.nodes if "checkpoint" in str(n.target)]
    assert len(regions) == 3


# PEFT


@pytest.fixture
def adapted() -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    return peft.get_peft_model(make_model("vit"), config).eval()


@torch.no_grad()
def test_a_peft_model_is_called_as_it_is(adapted: Any, tmp_path: Path) -> None:
    x = make_inputs("vit")["pixel_values"]
    merged = tomepass.apply(adapted, r=FEW, example_inputs=x)
    assert torch.equal(merged(x).logits, merged(pixel_values=x).logits)
    assert torch.equal(merged(x, labels=None).logits, merged(x).logits)
    assert len(merged._captures) == 1
    assert isinstance(merged, type(adapted))
    folded = tomepass.apply(adapted.merge_and_unload(), r=FEW)
    assert relative_error(merged(x).logits, folded(x).logits) < 1e-4


@torch.no_grad()
def test_adapters_are_saved_beside_the_method(adapted: Any, tmp_path: Path) -> None:
    merged = tomepass.apply(adapted, r=FEW)
    merged.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "tomepass.json"} <= names
    with pytest.raises(tomepass.TomeError, match=r"holds an adapter[^$]*PeftModel"):
        tomepass.load(tmp_path)


@torch.no_grad()
def test_adapters_on_a_merged_model() -> None:
    peft = pytest.importorskip("peft")
    x, model = make_inputs("vit")["pixel_values"], make_model("vit")
    merged = tomepass.apply(model, r=FEW)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(merged, config).eval()
    found = adapted(pixel_values=x).logits
    assert relative_error(found, tomepass.apply(model, r=FEW)(x).logits) < 1e-5
    with adapted.disable_adapter():
        assert relative_error(adapted(pixel_values=x).logits, found) > 1e-3
    assert relative_error(adapted(pixel_values=x).logits, found) < 1e-6


# accelerate


@torch.no_grad()
def test_accelerate_prepares_it_as_the_model() -> None:
    accelerate = pytest.importorskip("accelerate")
    x, model = make_inputs("vit")["pixel_values"], make_model("vit")
    merged = tomepass.apply(model, r=FEW)
    expected = merged(x).logits
    # Another test's Trainer has one of its own, and there is one a process.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(merged)
    assert prepared is merged
    cast = prepared(x).logits
    assert cast.dtype == torch.float32  # what accelerate makes of it
    assert 1e-6 < relative_error(cast, expected) < 0.1
    assert "forward" not in model.__dict__
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(plain(x).logits, expected)


@torch.no_grad()
def test_weights_that_accelerate_holds_elsewhere() -> None:
    accelerate = pytest.importorskip("accelerate")
    x, model = make_inputs("vit")["pixel_values"], make_model("vit")
    expected = tomepass.apply(model, r=FEW)(x).logits
    offloaded = accelerate.cpu_offload(make_model("vit"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(tomepass.TomeError, match=r"meta device.*hooks"):
            tomepass.apply(offloaded, r=FEW, example_inputs=x)
    hooked = make_model("vit")
    accelerate.hooks.attach_align_device_hook(hooked, execution_device="cpu")
    merged = tomepass.apply(hooked, r=FEW)
    assert relative_error(merged(x).logits, expected) < 1e-6
