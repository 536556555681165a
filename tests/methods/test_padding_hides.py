"""What padding holds shows nowhere: not in how many tokens merge, which, into what, or where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from depth import at_hand
from encoders import (
    PATCHES,
    Attention,
    Encoder,
    duplicates,
    make,
    near,
    pixels,
    with_zero_positions,
)
from table import OPTIONS, ROWS
from torch import Tensor
from zoo import make_inputs, relative_error

import tomepass
from tomepass import ATS, Prune, ToMe, TomeBackend
from tomepass.capture.captured import Capture, read_state
from tomepass.capture.exported import capture_module
from tomepass.handover.applied import apply_capture
from tomepass.methods import Method
from tomepass.ops.matching.match_kmeans import match_kmeans
from tomepass.ops.padding import PADDED, seen_stands

COUNTS = [8, 6, 5]
ROUNDING = 2e-5


class Masked(Attention):
    """Keys that are not to be seen are left out."""

    seen: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen)


class Padded(Encoder):
    """An encoder that is told which patches there are; its own tokens are always seen."""

    def forward(self, pixels: Tensor, seen: Tensor) -> Any:
        mask = F.pad(seen, (self.start, self.end), value=True)[:, None, None]
        for block in self.blocks:
            block.attention.__dict__["seen"] = mask
        return super().forward(pixels)


def masks() -> Tensor:
    """Padding at the end, at the start, here and there, and nearly everywhere: ``[6, 36]``."""
    place = torch.arange(PATCHES)
    drawn = torch.rand(2, PATCHES, generator=torch.Generator().manual_seed(3))
    few = (place[None] == torch.tensor([[7], [8]])) | (place == 21)
    return torch.stack([place < 20, place >= 11, *(drawn < 0.6), *few])


def elsewhere(x: Tensor, seen: Tensor, how: str) -> Tensor:
    """The same images with other patches where nothing is seen."""
    if how == "alike":
        other = torch.ones_like(x)
    else:
        other = 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    grid = seen.view(-1, 1, 6, 6).float()
    return torch.where(F.interpolate(grid, scale_factor=4) > 0, x, other)


def visible(y: Tensor, seen: Tensor, start: int = 1) -> Tensor:
    """What is said of the tokens that are seen, the encoder's own among them."""
    return y[F.pad(seen, (start, y.shape[1] - start - seen.shape[1]), value=True)]


def model(attention: type[Attention] = Masked, **choices: Any) -> Padded:
    blocks = [near(attention)] * len(COUNTS)
    return make(Padded, blocks=blocks, readout="dense", width=32, **choices)


@pytest.fixture(scope="module")
def captured() -> tuple[Padded, Capture]:
    made = model()
    return made, capture_module(made, {"pixels": pixels(6), "seen": masks()})


def most_moved(made: Padded, capture: Capture, method: Method) -> float:
    """How far other padding moves what is said of tokens that are seen."""
    applied = apply_capture(made, capture, method)
    if applied.graph is None:
        raise applied.report.refusal()
    x, seen = pixels(6), masks()
    found = []
    for images in (x, elsewhere(x, seen, "alike"), elsewhere(x, seen, "drawn")):
        (y,) = applied.graph(*read_state(made, capture), images, seen)
        found.append(visible(y, seen, made.start))
    assert relative_error(found[0], visible(made(x, seen), seen, made.start)) > 1e-3
    return max(relative_error(y, found[0]) for y in found[1:])


METHODS = {**ROWS, **OPTIONS}
AT_HAND = [
    *("tome_as_published", "prune_norm", "evit", "spvit_norm", "tofu_measured", "pitome"),
    *("diffrate", "greedy", "kmeans", "ats", "threshold", "avit", "dynamicvit"),
    *("tome_importance", "tome_softmax_max", "tome_sequential_keep", "tome_random_mlerp"),
    "tome_dot_mean",
]


@pytest.mark.parametrize("name", at_hand(METHODS, AT_HAND))
@torch.no_grad()
def test_what_padding_holds_shows_in_no_method(name: str, captured: Any) -> None:
    assert most_moved(*captured, METHODS[name].make(COUNTS)) < ROUNDING


CAPPED = [18, 9, 4]  # more than padding has partners: tokens that are seen merge with it
MIXING = [
    *("tome_as_published", "tome_sequential_keep", "tome_random_mlerp", "tome_softmax_max"),
    *("tome_dot_mean", "kmeans", "kmeans_euclidean"),
]


@pytest.mark.parametrize("name", MIXING)
@torch.no_grad()
def test_nor_where_nothing_else_is_left_to_merge_with(name: str, captured: Any) -> None:
    assert most_moved(*captured, METHODS[name].make(CAPPED)) < ROUNDING


class Everywhere(Masked):
    """The mask is there for each head and query."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.seen.expand(-1, q.shape[1], q.shape[2], -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize(
    ("method", "attention", "choices"),
    [
        (ToMe, Masked, {"start": 0}),
        (ATS, Masked, {"start": 4, "end": 1}),
        (Prune, Everywhere, {"start": 0, "end": 2}),
    ],
)
@torch.no_grad()
def test_nor_in_an_encoder_of_another_kind(
    method: type[Method], attention: type[Masked], choices: Any
) -> None:
    made = model(attention, **choices)
    capture = capture_module(made, {"pixels": pixels(6), "seen": masks()})
    assert most_moved(made, capture, method(COUNTS)) < ROUNDING


@torch.no_grad()
def test_nor_through_the_backend(captured: Any) -> None:
    made, x, seen = captured[0], pixels(6), masks()
    compiled = torch.compile(made, backend=TomeBackend(ToMe(COUNTS), inner="eager"))
    expected = visible(compiled(x, seen), seen)
    assert relative_error(visible(made(x, seen), seen), expected) > 1e-3
    assert relative_error(visible(compiled(elsewhere(x, seen, "drawn"), seen), seen), expected) < (
        ROUNDING
    )


@torch.no_grad()
def test_nor_in_a_text_model(shared_models: Any) -> None:
    text, inputs = shared_models["bert_padded"], make_inputs("bert_padded", 3)
    merged = tomepass.apply(text, r=[3, 4, 5], example_inputs=inputs)
    seen = inputs["attention_mask"].bool()
    found = []
    for shift in (0, 1, 40):
        words = torch.where(seen, inputs["input_ids"], (inputs["input_ids"] + shift) % 90 + 3)
        output = merged(input_ids=words, attention_mask=inputs["attention_mask"])
        found.append(output.last_hidden_state[seen])
    assert max(relative_error(y, found[0]) for y in found[1:]) < ROUNDING


@torch.no_grad()
def test_nor_in_the_budget_of_an_image() -> None:
    made, x, seen = model(), pixels(6), masks()
    merged = tomepass.apply(made, ToMe(8, adaptive=True), example_inputs=(x, seen))
    assert len(merged.routes(x, seen).unique()) > 1
    for how in ("alike", "drawn"):
        assert torch.equal(merged.routes(elsewhere(x, seen, how), seen), merged.routes(x, seen))


def test_padding_stands_only_where_nothing_else_is() -> None:
    size = torch.tensor([[1.0, PADDED / 9, 2.0, PADDED / 9, PADDED / 9]])
    assign = torch.tensor([[0, 0, 1, 1, 2]])
    assert seen_stands(torch.tensor([[1, 2, 4]]), assign, size).tolist() == [[0, 2, 4]]
    assert seen_stands(torch.tensor([[0, 3, 4]]), assign, size[:, :5]).tolist() == [[0, 2, 4]]
    with pytest.raises(ValueError, match="expected size"):
        seen_stands(torch.tensor([[1, 2, 4]]), assign, size[:, :4])


@torch.no_grad()
def test_what_is_seen_is_lossless_beside_any_padding() -> None:
    made, x = with_zero_positions(model()), duplicates(3)
    seen = torch.arange(PATCHES) < torch.tensor([[30], [36], [25]])
    x = elsewhere(x, seen, "drawn")
    expected = visible(made(x, seen), seen)
    capture = capture_module(made, {"pixels": x, "seen": seen})
    found = []
    for method in (ToMe([9, 6, 4]), ToMe([9, 6, 4], prop_attn=False)):
        graph: Any = apply_capture(made, capture, method).graph
        (y,) = graph(*read_state(made, capture), x, seen)
        found.append(relative_error(visible(y, seen), expected))
    assert found[0] < 1e-4
    assert found[1] > 1e-3


def test_padding_moves_no_centres_of_tokens() -> None:
    """Where no seed is padding, all of it joins the first cluster, whose centre stays its own."""
    size = torch.ones(1, 9)
    size[0, [1, 2, 4, 5]] = PADDED / 9  # clusters start at 0, 3 and 6
    place = torch.tensor([0.0, 9, 9, 10, 9, 9, 20, 4, 13])
    found = []
    for far in (0.0, 400.0):
        features = torch.where(size[0] < PADDED, far, place)[None, None, :, None]
        found.append(match_kmeans(features, 6, [], size, "euclidean", 4)[0][0, 7:])
    assert found[0].tolist() == found[1].tolist() == [0, 1]
