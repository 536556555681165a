"""What hides keys is a mask, however it is written: added, multiplied, chosen, put in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from depth import at_hand
from encoders import ByHand, Encoder, duplicates, make, near, with_zero_positions
from functional import block, captured
from torch import Tensor, fx
from zoo import relative_error

import tomepass
from tomepass import ToMe, TomeBackend, TomeError
from tomepass.planning.plan_graph import plan_graph
from tomepass.reading.masks import is_position_bias

aten = torch.ops.aten


def apart() -> Tensor:
    """How far each key stands from each query."""
    place = torch.arange(12)
    return place[:, None] - place


def near_by(reach: int = 3) -> Tensor:
    """Which keys stand no further off than that."""
    return apart().abs() <= reach


def table(weight: Tensor) -> Tensor:
    """Something learned for each pair of tokens."""
    return weight.repeat(2, 2)[:12, :12]


def is_bias(made: Callable[[Tensor], Tensor]) -> bool:
    graph = captured(lambda x, valid, weight: made(weight) + 0 * x.sum())
    (total,) = graph.graph.output_node().all_input_nodes
    return is_position_bias(total.args[0], graph)  # type: ignore[arg-type]


HIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "a wide constant": lambda w: torch.where(near_by(), 0.0, -100.0),
    "a wide constant, positive": lambda w: near_by() * 50.0,
    "the same for all queries": lambda w: torch.where(torch.arange(12) > 2, 0.0, -30.0)[None],
    "as a factor": lambda w: (1.0 - near_by().float()) * -40.0,
    "in steps": lambda w: -8.0 * apart().abs().float(),
    "a logarithm": lambda w: (near_by().float() + 1e-9).log(),
    "added to what is learned": lambda w: table(w) + torch.where(near_by(), 0.0, -100.0),
    "subtracted from it": lambda w: table(w) - torch.where(near_by(), 0.0, 100.0),
    "chosen beside it": lambda w: torch.where(near_by(), table(w), -100.0),
    "chosen as a tensor": lambda w: torch.where(near_by(), table(w), torch.full((12, 12), -60.0)),
    "filled in": lambda w: table(w).masked_fill(~near_by(), -100.0),
    "filled in, then turned": lambda w: table(w).masked_fill(~near_by(), -100.0).flip(0).t(),
    "padded": lambda w: F.pad(table(w)[:, :10], (0, 2), value=-100.0),
    "put beside it": lambda w: torch.cat([table(w)[:, :10], torch.full((12, 2), -100.0)], 1),
    "minus infinity": lambda w: table(w).masked_fill(~near_by(), -math.inf),
}
HIDES_NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "learned": table,
    "a narrow constant": lambda w: torch.where(near_by(), 0.0, -2.0),
    "slow steps": lambda w: -0.5 * apart().abs().float(),
    "wide between queries alone": lambda w: 100.0 * torch.arange(12.0)[:, None].expand(12, 12),
    "learned and narrow": lambda w: table(w) + torch.where(near_by(), 0.5, -2.0),
    "learned times distances": lambda w: w[0, 0] * apart().abs().float() * 10,
    "learned, scaled": lambda w: table(w) * 100.0,
    "squashed": lambda w: 16.0 * table(w).sigmoid(),
    "of coordinates": lambda w: F.linear(apart()[..., None] * 4.0, w[:1, :1])[..., 0],
    "clamped": lambda w: table(w).clamp(-100.0, 100.0),
    "chosen among learned": lambda w: torch.where(near_by(), table(w), 0.5 * table(w)),
    "looked up": lambda w: table(w)[apart().abs(), 0],
}


@pytest.mark.parametrize("made", HIDES.values(), ids=HIDES.keys())
def test_what_hides_a_key_is_no_bias(made: Callable[[Tensor], Tensor]) -> None:
    assert not is_bias(made)


@pytest.mark.parametrize("made", HIDES_NOTHING.values(), ids=HIDES_NOTHING.keys())
def test_what_hides_none_is_one(made: Callable[[Tensor], Tensor]) -> None:
    assert is_bias(made)


# ---- masks that multiply -----------------------------------------------------------------------


def refused(attend: Callable[..., Tensor], mask: Callable[[Tensor], Tensor]) -> Any:
    """Why an encoder is refused whose second block attends so."""

    def model(x: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        x = block(x, weight)
        y = F.layer_norm(x, (8,))
        q, k, v = (F.linear(y, weight * i).view(2, -1, 2, 4).transpose(1, 2) for i in (1, 2, 3))
        scores = q @ k.transpose(-1, -2) * 0.5
        y = attend(scores, v, mask(valid)).transpose(1, 2).reshape(x.shape)
        return block(x + y, weight)[:, 0]

    planned = plan_graph(captured(model), ToMe(2))
    return planned.mismatches[0].reason if planned.mismatches else None


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "local": lambda valid: near_by().float(),
    "of keys": lambda valid: (torch.arange(12) > 2).float(),
    "of queries": lambda valid: (torch.arange(12) > 2).float()[:, None],
    "of the input": lambda valid: valid[:, None, None].float(),
}
ATTEND: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "scores": lambda s, v, m: (s * m).softmax(-1) @ v,
    "weights": lambda s, v, m: (s.softmax(-1) * m) @ v,
    "renormalised": lambda s, v, m: (
        (w := s.softmax(-1) * m) / w.sum(-1, keepdim=True).clamp(1e-9) @ v
    ),
    "einsum": lambda s, v, m: (
        torch.einsum(
            "bhnm,nm->bhnm",
            s.softmax(-1),
            m.expand(12, 12) if m.ndim < 3 else m[0, 0].expand(12, 12),
        )
        @ v
    ),
    "chosen": lambda s, v, m: torch.where(m > 0, s.softmax(-1), 0.0) @ v,
    "chosen before": lambda s, v, m: torch.where(m > 0, s, -100.0).softmax(-1) @ v,
    "exponentials": lambda s, v, m: (s + torch.log(m + 1e-8)).softmax(-1) @ v,
    "values": lambda s, v, m: (
        s.softmax(-1) @ (v * m.reshape(-1, 1, 12, 1) if m.ndim != 2 else v * m[:, :1])
    ),
}


@pytest.mark.parametrize(
    ("attend", "mask"),
    at_hand(
        itertools.product(ATTEND, MASKS),
        [
            (attend, mask)
            for place, attend in enumerate(ATTEND)
            for turn, mask in enumerate(MASKS)
            if "einsum" in attend or turn == place % len(MASKS)
        ],
    ),
)
def test_a_mask_that_multiplies_is_found_out(attend: str, mask: str) -> None:
    found = refused(ATTEND[attend], MASKS[mask])
    if (attend, mask) == ("exponentials", "of queries"):
        assert found is None  # a row that is lowered as a whole hides nothing
    else:
        assert found is not None


def test_what_multiplies_all_keys_alike_is_none() -> None:
    assert refused(ATTEND["weights"], lambda valid: torch.tensor(0.5)) is None
    assert refused(ATTEND["scores"], lambda valid: torch.full((2, 1, 1), 0.5)) is None


def tokens(factor: Callable[[], Tensor]) -> Any:
    """Why an encoder is refused that multiplies its tokens between blocks."""

    def model(x: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        x = block(x, weight)
        x = x + F.linear(x, weight) * factor()
        return block(x, weight)[:, 0]

    planned = plan_graph(captured(model), ToMe(2))
    return planned.mismatches[0].reason if planned.mismatches else None


def test_a_mask_that_multiplies_tokens_is_refused() -> None:
    for made in (
        lambda: (torch.arange(12) > 2).float()[:, None],
        lambda: (1.0 - (torch.arange(12) > 2).float())[None, :, None],
        lambda: torch.where(torch.arange(12) > 2, 1.0, 0.0)[:, None],
        lambda: (torch.arange(12) > 2).long()[:, None] * 1.0,
        lambda: (torch.arange(12) > 2)[:, None],
    ):
        assert "is a mask that multiplies tokens" in (tokens(made) or "")
    for table in (
        lambda: (torch.arange(12) * 0.3).sin()[:, None],
        lambda: torch.linspace(0.5, 1.5, 12)[:, None],
    ):
        assert tokens(table) is None


# ---- from end to end ---------------------------------------------------------------------------


class Local(ByHand):
    """Only neighbours are seen: all others' scores are lowered by a hundred."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        hidden = torch.where((place[:, None] - place).abs() <= 4, 0.0, -100.0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=hidden)


@torch.no_grad()
def test_local_attention_is_refused_in_both_doors() -> None:
    model, x = make(blocks=[near(Local)] * 2), duplicates(2)
    with pytest.raises(TomeError, match="not provably all true"):
        tomepass.apply(model, r=4, example_inputs=x)
    # Dynamo wraps what a backend raises.
    with pytest.raises(Exception, match="not provably all true"):
        torch.compile(model, backend=TomeBackend(ToMe(4), inner="eager"))(x)


class Penalised(ByHand):
    """A bias of keys, subtracted from the scores, which are scaled after that."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.far = torch.nn.Parameter(2 * torch.randn(37))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.sub(q @ k.transpose(-1, -2), self.far, alpha=2) * q.shape[-1] ** -0.5
        return scores.softmax(-1) @ v


@torch.no_grad()
def test_a_bias_of_merged_keys_is_exact_whatever_it_is_multiplied_by() -> None:
    """Equal tokens whose keys weigh differently: together they weigh what they did apart."""
    model: Encoder = with_zero_positions(make(blocks=[near(Penalised)] * 3, readout="mean"))
    x = duplicates(3)
    merged = tomepass.apply(model, r=[9, 7, 5], example_inputs=x)
    assert relative_error(merged(x), model(x)) < 1e-4


def test_the_helpers_trace_what_they_say() -> None:
    (node,) = captured(lambda x, valid, weight: table(weight)).graph.output_node().all_input_nodes
    assert isinstance(node, fx.Node)
