"""Layers and lengths that small inputs choose: merged and lossless, or refused in our own words."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from depth import at_hand
from encoders import HEADS, Encoder, duplicates, kinds, make, scaled_up, with_zero_positions
from lossless import LOSSLESS, errors
from torch import Tensor, nn
from zoo import relative_error

import tomepass
from tomepass import ToMe, TomeBackend, TomeError

Chosen = Callable[[nn.ModuleList, Tensor, Tensor], Tensor]


def written(adapters: nn.ModuleList, x: Tensor, which: Tensor) -> Tensor:
    new = torch.zeros_like(x)
    for i, adapter in enumerate(adapters):
        new[which == i] = adapter(x[which == i])
    new += x
    return new


def put(adapters: nn.ModuleList, x: Tensor, which: Tensor) -> Tensor:
    new = torch.zeros_like(x)
    for i, adapter in enumerate(adapters):
        new = new.index_put((which == i,), adapter(x[which == i]))
    return x + new


def picked(adapters: nn.ModuleList, x: Tensor, which: Tensor) -> Tensor:
    made = [torch.where((which == i)[:, None, None], a(x), 0.0) for i, a in enumerate(adapters)]
    return x + sum(made)


def weighed(adapters: nn.ModuleList, x: Tensor, which: Tensor) -> Tensor:
    shares = F.one_hot(which, len(adapters)).to(x.dtype)
    return x + torch.einsum("bk,bknc->bnc", shares, torch.stack([a(x) for a in adapters], 1))


def gathered(adapters: nn.ModuleList, x: Tensor, which: Tensor) -> Tensor:
    matrix = torch.stack([a.weight for a in adapters])[which]
    return x + x @ matrix.transpose(1, 2)


CHOSEN: dict[str, Chosen] = {
    choose.__name__: choose for choose in (written, put, picked, weighed, gathered)
}


class Switching(Encoder):
    """Each image goes through one of two adapters behind every block, as its language says."""

    choose: Chosen = staticmethod(written)

    def __init__(self, **choices: Any) -> None:
        super().__init__(**choices)
        self.adapters = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, pixels: Tensor, which: Tensor) -> Any:
        x = self.embed(pixels)
        for block in self.blocks:
            x = self.choose(self.adapters, block(x), which)
        return self.read(self.final(x))


def applied(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """What ``apply`` makes of a model; None where it refuses it."""
    try:
        return tomepass.apply(model, r=7, example_inputs=inputs)
    except TomeError:
        return None


def compiled(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The same through the backend, whose refusals Dynamo wraps."""
    torch._dynamo.reset()
    try:
        made = torch.compile(model, backend=TomeBackend(ToMe(7), inner="eager"))
        made(*inputs)
    except TomeError:
        return None
    except torch._dynamo.exc.BackendCompilerFailed as wrapped:
        if not isinstance(wrapped.inner_exception, TomeError):
            raise
        return None
    return made


@pytest.mark.parametrize("name", at_hand(CHOSEN, list(CHOSEN)[:2]))
@torch.no_grad()
def test_adapters_that_an_input_chooses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Switching, "choose", staticmethod(CHOSEN[name]))
    model, x = with_zero_positions(make(Switching, readout="mean")), duplicates(3)
    others = [(x, torch.tensor(which)) for which in ([1, 0, 0], [1, 1, 1])]
    assert relative_error(model(*others[0]), model(*others[1])) > 1e-2
    inputs = (x, torch.tensor([0, 1, 1]))
    for door in (applied, compiled):
        merged = door(model, inputs)
        if merged is None:  # Dynamo breaks a graph where data decide a size
            assert door is compiled
            assert name in ("written", "put")
            continue
        for given in (inputs, *others):
            assert relative_error(merged(*given), model(*given)) < 1e-4


class Packed(Encoder):
    """Tokens of all images in one sequence, an attention an image, as long as a tensor says."""

    def forward(self, pixels: Tensor, lengths: Tensor) -> Any:
        x = (self.patches(pixels).flatten(2).transpose(1, 2)).flatten(0, 1)[None]
        for block in self.blocks:
            x = x + self.attend(block, block.norm1(x)[0], lengths)
            x = x + block.mlp(block.norm2(x))
        return self.head(self.final(x))

    def attend(self, block: Any, x: Tensor, lengths: Tensor) -> Tensor:
        maps = (block.attention.q, block.attention.k, block.attention.v)
        operands = [m(x).view(len(x), HEADS, -1).transpose(0, 1)[None] for m in maps]
        parts = [torch.split(operand, lengths.tolist(), dim=2) for operand in operands]
        y = torch.cat([F.scaled_dot_product_attention(*of) for of in zip(*parts)], dim=2)  # noqa: B905
        return block.attention.out(y[0].transpose(0, 1).reshape(len(x), -1))


@pytest.mark.parametrize("lengths", at_hand([[72], [36, 36], [20, 52]], [[20, 52]]))
@torch.no_grad()
def test_attention_an_image_of_lengths_that_an_input_tells(lengths: list[int]) -> None:
    model, x = make(Packed, start=0), duplicates(2)
    inputs = (x, torch.tensor(lengths))
    for door in (applied, compiled):
        merged = door(model, inputs)
        assert merged is None or relative_error(merged(*inputs), model(*inputs)) < 1e-4
    with contextlib.suppress(TomeError):  # it could not be captured
        assert tomepass.explain(model, r=4, example_inputs=inputs).refused


# ---- towers that do so ---------------------------------------------------------------------------


def tiny(name: str, **fields: Any) -> Any:
    """A model of transformers with random weights, by the names of its module and class."""
    folder, cls = name.split(".")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    kind = getattr(module, cls)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = kind.config_class(num_hidden_layers=3, **small, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = scaled_up(kind._from_config(config))
        for parameter in model.parameters():
            if not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def without_places(model: nn.Module) -> nn.Module:
    """The same, turning no key and adding no position."""
    for name, held in [*model.named_parameters(), *model.named_buffers()]:
        if held.is_floating_point() and ("position" in name or "inv_freq" in name):
            held.data.zero_()
    return model


def grids(kind: str, sizes: list[list[int]]) -> dict[str, Tensor]:
    count = sum(rows * columns for _, rows, columns in sizes)
    if kind == "minimax":
        return {"pixel_values": torch.randn(count, 96), "grid_thw": torch.tensor(sizes)}
    return {"pixel_values": torch.randn(count, 8, 8, 3), "image_grid_thw": torch.tensor(sizes)}


TOWERS = {
    "minimax": ("minimax_m3_vl.MiniMaxM3VLVisionModel", {"patch_size": 4, "image_size": 32}),
    "inkling": ("inkling2.Inkling2VisionModel", {"patch_size": 4}),
}


@pytest.mark.deep
@pytest.mark.parametrize("sizes", [[[1, 4, 6]], [[1, 4, 6], [1, 6, 8]], [[1, 4, 4], [1, 4, 4]]])
@pytest.mark.parametrize("name", TOWERS)
def test_towers_of_packed_images(name: str, sizes: list[list[int]]) -> None:
    pytest.importorskip(f"transformers.models.{TOWERS[name][0].split('.')[0]}")
    model, inputs = tiny(TOWERS[name][0], **TOWERS[name][1]), grids(name, sizes)
    with torch.no_grad():
        model(**inputs)
        with pytest.raises(TomeError, match=r"cannot be merged|could not capture"):
            tomepass.apply(model, r=4, example_inputs=inputs)


@pytest.mark.deep
@torch.no_grad()
def test_languages_of_a_text_model() -> None:
    fields = {"vocab_size": 99, "languages": ["one", "two"], "default_language": "one"}
    model = without_places(tiny("xmod.XmodModel", max_position_embeddings=64, **fields))
    words = kinds(3, 24) * 7 + 5
    with pytest.raises(TomeError, match="cannot be merged"):
        tomepass.apply(model, r=4, example_inputs={"input_ids": words})
    inputs = {"input_ids": words, "lang_ids": torch.tensor([0, 1, 1])}
    merged = tomepass.apply(model, r=4, example_inputs=inputs)
    for which in ([0, 1, 1], [1, 0, 0], [1, 1, 1]):
        given = {**inputs, "lang_ids": torch.tensor(which)}
        assert max(errors(merged(**given), model(**given))) < LOSSLESS


@pytest.mark.deep
@pytest.mark.parametrize("seconds", [[2.56, 2.56], [2.56, 1.8]])
@torch.no_grad()
def test_an_audio_tower_whose_lengths_hide_frames(seconds: list[float]) -> None:
    pytest.importorskip("transformers.models.dots3_note")
    fields = {"feature_size": 16, "downsample_hidden_size": 8, "adapter_input_size": 32}
    audio = "dots3_note.Dots3NoteAudioModel"
    model = without_places(tiny(audio, **fields, adapter_out_dim=16, max_position_embeddings=64))
    drawn = torch.randn(3, 2, 16, 1, generator=torch.Generator().manual_seed(1))
    frames = [x.expand(-1, -1, n) for x, n in zip(drawn, (128, 64, 64), strict=True)]
    lengths = torch.tensor([int(second * 16000) for second in seconds])
    inputs = {"input_features": torch.cat(frames, -1), "chunk_sample_lengths": lengths}
    expected = model(**inputs)
    merged = tomepass.apply(model, r=[4], example_inputs=inputs)
    outputs = merged(**inputs)
    found = max(errors(outputs, expected))
    assert found < LOSSLESS / 20
    unweighted = tomepass.apply(model, ToMe([4], prop_attn=False), example_inputs=inputs)
    assert max(errors(unweighted(**inputs), expected)) > 20 * found
