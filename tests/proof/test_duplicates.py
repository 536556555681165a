"""The duplicates oracle: which input it makes, when it is blind, and that it sees what it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import Encoder, make, pixels
from torch import Tensor, nn
from zoo import make_inputs, make_model

from tomepass import MLERP, ToMe
from tomepass.capture.exported import capture_module
from tomepass.ops.attending.log_size import log_size
from tomepass.proof.duplicates import DuplicatesResult, check_duplicates, constant_regions


def result(model: nn.Module, r: Any, **inputs: Any) -> DuplicatesResult:
    """The oracle's answer for an encoder."""
    call = inputs or {"pixels": pixels(2)}
    method = r if isinstance(r, ToMe) else ToMe(r)
    with torch.no_grad():
        return check_duplicates(model, capture_module(model, call), method, call)


def test_constant_regions_are_bands_of_unequal_height() -> None:
    image = constant_regions(torch.zeros(2, 3, 20, 30), dim=-2)
    assert image.shape == (2, 3, 20, 30)
    rows = image[0, :, :, 0].T
    assert torch.equal(image[0], rows.T[:, :, None].expand(3, 20, 30))
    _, counts = rows.unique_consecutive(dim=0, return_counts=True)
    assert counts.tolist() == [8, 6, 4, 2]
    assert not torch.equal(image[0], image[1])


def test_constant_regions_can_lie_across() -> None:
    columns = constant_regions(torch.zeros(1, 40, 50), dim=-1)
    _, counts = columns[0, 0].unique_consecutive(return_counts=True)
    assert counts.tolist() == [20, 15, 10, 5]
    assert torch.equal(columns, columns[:, :1].expand(1, 40, 50))


@pytest.mark.parametrize(
    "value", [torch.arange(12), torch.zeros(2, 3), True, None, "text", torch.ones(2, 4, 4).long()]
)
def test_what_is_no_image_stays_as_it_is(value: Any) -> None:
    assert constant_regions(value) is value


def test_the_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    constant_regions(torch.zeros(2, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("r", [6, [9, 3], (6, -1.0)])
def test_duplicates_are_lossless_and_the_control_is_not(r: Any) -> None:
    found = result(make(readout="mean"), r)
    assert found.blind is None
    assert found.error < 1e-5
    assert found.control > 1e-2
    assert found.schedule == ToMe(r).schedule


def test_the_parameters_stay_as_they_are() -> None:
    model = make(readout="mean")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result(model, 4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("combine", ["max", "keep", MLERP()], ids=str)
def test_it_is_halved_however_tokens_are_combined(combine: Any) -> None:
    found = result(make(readout="mean", depth=3), ToMe(16, combine=combine))
    assert repr(found.schedule) == "r=8"
    assert found.blind is None
    assert found.error < 1e-5


@pytest.mark.parametrize(
    ("r", "schedule"), [(16, "r=8"), ([17, 16, 9], "r=[8, 8, 4]"), ((16, 0), "r=(8, 0.0)")]
)
def test_a_schedule_that_must_merge_different_tokens_is_halved(r: Any, schedule: str) -> None:
    # 36 patches on 6 rows, under bands 10, 7, 5 and 2 pixels high: six kinds do not fit in five.
    found = result(make(readout="mean", depth=3), r)
    assert repr(found.schedule) == schedule
    assert found.blind is None


@pytest.mark.deep
def test_it_is_blind_where_nothing_is_alike() -> None:
    class Numbered(Encoder):
        """Its tokens differ by position, through no embedding that is added."""

        def embed(self, pixels: Tensor) -> Tensor:
            x = super().embed(pixels)
            return torch.stack([t.roll(i, -1) * (1 + i) for i, t in enumerate(x.unbind(1))], dim=1)

    found = result(make(Numbered, readout="mean", start=0), 4)
    assert found.blind is not None
    assert "only identical tokens" in found.blind


def test_it_is_blind_without_proportional_attention() -> None:
    found = result(make(), ToMe(4, prop_attn=False))
    assert found.blind == "proportional attention is off"


def test_it_sees_a_wrong_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    from tomepass.rewriting import attending

    real = log_size

    def wrong(size: Tensor, query: Tensor, dim: int) -> Tensor:
        return 1.1 * real(size, query, dim)

    wrong.__name__ = "log_size"
    monkeypatch.setattr(attending, "log_size", wrong)
    found = result(make(readout="mean"), 6)
    assert found.error > 1e-3


def test_towers_of_different_depth_share_one_schedule() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = Encoder(depth=1, readout="mean")
            self.other = Encoder(depth=3, readout="mean")

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return torch.cat([self.one(left), self.other(right)], dim=-1)

    found = result(make(Towers), 4, left=pixels(), right=pixels(seed=1))
    assert found.blind is None
    assert found.error < 1e-5


@pytest.mark.parametrize("name", ["clip_vision", "ast"])
def test_position_terms_of_every_kind_are_taken_out(name: str) -> None:
    # An embedding table and overlapping patches; with positions left in, nothing is alike.
    found = result(make_model(name), 9, **make_inputs(name))
    assert found.blind is None
    assert found.error < 1e-5
    assert found.control > 1e-2


def test_regions_are_constant_whatever_was_there() -> None:
    image = constant_regions(torch.randn(2, 3, 20, 30), dim=-2)
    assert torch.equal(image, image[..., :1].expand(2, 3, 20, 30))
    _, counts = image[0, :, :, 0].T.unique_consecutive(dim=0, return_counts=True)
    assert counts.tolist() == [8, 6, 4, 2]
