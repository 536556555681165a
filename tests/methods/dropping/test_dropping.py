"""What drops tokens, in encoders of all forms: tokens of their own, readouts, attentions, doors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from depth import at_hand, covering
from encoders import Attention, ByHand, make, near, pixels
from table import ROWS
from torch import nn
from zoo import relative_error

from tomepass import TomeBackend
from tomepass.capture.captured import read_state
from tomepass.capture.exported import capture_module
from tomepass.handover.applied import apply_capture

DROPPING = (
    *("prune", "prune_received", "prune_norm", "prune_random", "evit", "evit_without_fusion"),
    *("spvit", "diffrate", "ats", "avit", "dynamicvit", "adavit", "tofu"),
)
READOUTS = ("dense", "patches", "class", "mean", "last")
OWN = ((1, 0), (0, 0), (5, 0), (1, 2))
PROTECTED = (None, (3,), (0, 8, 20))
COUNTS = [9, 0, 7]


class Scaled(nn.Module):
    """A block that scales what it adds, without a bias of its keys, its queries and keys normed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = Normed(width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.full((2, width), 0.7))

    def forward(self, x: Any) -> Any:
        x = self.attention(self.norm1(x)) * self.scale[0] + x
        return self.mlp(self.norm2(x)).relu() * self.scale[1] + x


class Normed(Attention):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.k = nn.Linear(width, width, bias=False)

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        q, k = (nn.functional.layer_norm(x, x.shape[-1:]) for x in (q, k))
        return super().attend(q, k, v)


BLOCKS = {"fused": near(Attention), "written": near(ByHand), "scaled": Scaled}


AXES: list[list[Any]] = [list(a) for a in (DROPPING, READOUTS, OWN, PROTECTED, BLOCKS)]


def forms(strength: int) -> list[tuple[Any, ...]]:
    """Of each axis every value, or of any two every pair."""
    rows = covering([len(axis) for axis in AXES], strength)
    return [tuple(axis[i] for axis, i in zip(AXES, row, strict=True)) for row in rows]


AT_HAND = [form for form in forms(1) if form[0] in ("prune", "prune_norm", "evit", "ats", "adavit")]
FORMS = list(dict.fromkeys(AT_HAND + forms(2)))


@pytest.mark.parametrize(
    ("name", "readout", "own", "protected", "block"),
    at_hand(FORMS, AT_HAND, ["-".join(map(str, form)) for form in FORMS]),
)
@torch.no_grad()
def test_tokens_are_dropped_in_encoders_of_any_form(
    name: str, readout: Any, own: tuple[int, int], protected: Any, block: str
) -> None:
    start, end = own
    if readout == "class" and not start:
        readout = "mean"
    choices = {"start": start, "end": end, "width": 32, "readout": readout}
    model, x = make(blocks=[BLOCKS[block]] * 3, **choices), pixels(2)
    method = ROWS[name].make(COUNTS, protected=protected)
    capture = capture_module(model, {"pixels": x})
    applied = apply_capture(model, capture, method)
    assert applied.graph is not None, applied.report
    (stream,) = applied.report.streams
    assert stream.tokens == 36 + start + end
    (ours,) = applied.graph(*read_state(model, capture), x)
    expected = model(x)
    assert ours.shape == expected.shape
    assert bool(ours.isfinite().all())
    assert relative_error(ours, expected) > 1e-5
    if block != "fused":
        return
    compiled = torch.compile(model, backend=TomeBackend(method, inner="eager"))
    torch.testing.assert_close(compiled(x), ours, rtol=1e-4, atol=1e-5)
