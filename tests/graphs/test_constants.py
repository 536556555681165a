"""Attention masks that provably hide nothing, and those that only look like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from depth import at_hand
from torch import Tensor, fx
from tracing import capture
from zoo import CORE, make_inputs, make_model

from tomepass.capture.exported import capture_module
from tomepass.capture.idle_masks import hides_nothing
from tomepass.graphs.constants import constant_value
from tomepass.reading.attention import find_attentions

HEADS, TOKENS = 2, 6
Mask = Callable[[Tensor, Tensor], Tensor]


def every() -> Tensor:
    return torch.ones(TOKENS, TOKENS, dtype=torch.bool)


def causal() -> Tensor:
    return every().tril()


def written(mask: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    """A mask into which something is written after it was made."""
    write(mask)
    return mask


def captured_mask(mask: Mask) -> fx.Node:
    """The mask's node in a graph of an attention with a symbolic batch and a parameter."""

    def attend(x: Tensor, parameter: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask(x, parameter))

    x, parameter = torch.randn(3, HEADS, TOKENS, 4), torch.ones(TOKENS)
    module = capture(attend, x, parameter, dynamic=(0,))
    (attention,) = [a.result for a in find_attentions(module.graph)[0]]
    node = attention.args[3] if len(attention.args) > 3 else attention.kwargs["attn_mask"]
    assert isinstance(node, fx.Node)
    return node


HIDE_NOTHING: dict[str, Mask] = {
    "ones": lambda x, p: every(),
    "as-transformers-makes-it": lambda x, p: (
        torch.arange(TOKENS)[None, None, None, :] >= 0
    ).expand(x.shape[0], 1, TOKENS, TOKENS),
    "from-positions": lambda x, p: torch.arange(TOKENS)[:, None] - torch.arange(TOKENS) <= TOKENS,
    "both-triangles": lambda x, p: causal() | every().triu(),
    "not-none": lambda x, p: ~torch.zeros(1, TOKENS, dtype=torch.bool),
    "first-of-more": lambda x, p: torch.zeros(1, 1, 1, 2 * TOKENS).expand(
        x.shape[0], -1, TOKENS, -1
    )[:, :, :, : x.shape[2]],
    "cast": lambda x, p: torch.ones(TOKENS, TOKENS).to(torch.bool),
    "per-head": lambda x, p: every().expand(x.shape[0], HEADS, -1, -1).contiguous(),
    "view": lambda x, p: torch.ones(TOKENS**2, dtype=torch.bool).view(1, 1, TOKENS, TOKENS),
    "zeros": lambda x, p: torch.zeros(TOKENS, TOKENS),
    "zeros-broadcast": lambda x, p: torch.zeros(1, 1, 1, TOKENS).expand(x.shape[0], -1, TOKENS, -1),
    "minus-zero": lambda x, p: -torch.zeros(TOKENS, TOKENS),
    "zero-where-all": lambda x, p: torch.where(every(), 0.0, -torch.inf),
    "filled-nowhere": lambda x, p: torch.zeros(TOKENS, TOKENS).masked_fill(~every(), -torch.inf),
}

MAY_HIDE: dict[str, Mask] = {
    "causal": lambda x, p: causal(),
    "causal-added": lambda x, p: torch.zeros(TOKENS, TOKENS).masked_fill(~causal(), -torch.inf),
    "causal-expanded": lambda x, p: causal().expand(x.shape[0], 1, -1, -1),
    # Rows and columns change places behind a batch of any size.
    "causal-from-expanded": lambda x, p: (
        torch.arange(TOKENS)[None].expand(x.shape[0], -1).unsqueeze(-1) >= torch.arange(TOKENS)
    ).unsqueeze(1),
    "sliced-to-the-hidden": lambda x, p: (torch.arange(2 * TOKENS) >= TOKENS)[None, None].expand(
        x.shape[0], TOKENS, -1
    )[:, :, :TOKENS][:, None],
    "one-false": lambda x, p: torch.arange(TOKENS**2).view(TOKENS, TOKENS) != 17,
    "nothing-seen": lambda x, p: ~every(),
    "window": lambda x, p: (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs() < 3,
    "one-small-bias": lambda x, p: (torch.arange(TOKENS) == 3)[None] * 1e-30,
    "not-a-number": lambda x, p: torch.zeros(TOKENS, TOKENS) * torch.nan,
    "padding": lambda x, p: (x[:, :, :, 0] != 0)[:, :, None],
    "always-true-of-the-input": lambda x, p: (x[:, :, :, 0] == x[:, :, :, 0])[:, :, None],
    "zero-times-the-input": lambda x, p: (x[:, :, :, 0] * 0)[:, :, None],
    "always-true-of-a-parameter": lambda x, p: (p == p)[None],
    "zero-times-a-parameter": lambda x, p: 0 * p.expand(TOKENS, TOKENS),
    "a-parameter": lambda x, p: p[None],
    "of-the-batch": lambda x, p: (torch.arange(x.shape[0]) >= 0)[:, None, None, None],
    "of-the-batch-size": lambda x, p: torch.full((TOKENS, TOKENS), 0.0) + (x.shape[0] - 3),
    "likely-true": lambda x, p: torch.rand(TOKENS, TOKENS) < 0.9999,
    "drawn": lambda x, p: torch.bernoulli(torch.ones(TOKENS, TOKENS)).bool(),
    "dropped-out": lambda x, p: F.dropout(torch.zeros(TOKENS, TOKENS), 0.5, training=True) + p,
    "uninitialised": lambda x, p: torch.empty(TOKENS, TOKENS) * 0,
    "written": lambda x, p: written(every(), lambda m: m.logical_and_(causal())),
    "written-with-data": lambda x, p: written(
        torch.zeros(TOKENS, TOKENS), lambda m: m.copy_(p.expand(TOKENS, -1))
    ),
    "written-into-a-row": lambda x, p: written(every(), lambda m: m[0].fill_(False)),
    "written-into-a-part": lambda x, p: written(
        every(), lambda m: m.view(-1).chunk(2)[1][2:].fill_(False)
    ),
    "written-by-index": lambda x, p: written(
        every(), lambda m: m.index_put_((torch.arange(1),), torch.zeros(1, dtype=torch.bool))
    ),
    "written-then-expanded": lambda x, p: written(every(), lambda m: m[0].fill_(False)).expand(
        x.shape[0], 1, -1, -1
    ),
    "written-through-the-expanded": lambda x, p: written(
        every()[None], lambda m: m.expand(1, -1, -1).contiguous()[0].fill_(False)
    ),
}


@pytest.mark.parametrize("name", HIDE_NOTHING)
def test_a_mask_that_hides_nothing_is_seen_through(name: str) -> None:
    assert hides_nothing(captured_mask(HIDE_NOTHING[name]))


@pytest.mark.parametrize("name", MAY_HIDE)
def test_a_mask_that_may_hide_something_is_kept(name: str) -> None:
    assert not hides_nothing(captured_mask(MAY_HIDE[name]))


def test_the_verdict_agrees_with_the_mask_itself() -> None:
    # The lists above are right about the masks that need no input.
    x, parameter = torch.randn(3, HEADS, TOKENS, 4), torch.ones(TOKENS)
    for make in HIDE_NOTHING.values():
        mask = make(x, parameter)
        assert bool(mask.all()) if mask.dtype is torch.bool else not bool(mask.any())
    for name in ("causal", "causal-added", "one-false", "window", "written", "written-into-a-row"):
        mask = MAY_HIDE[name](x, parameter)
        assert not bool(mask.all()) if mask.dtype is torch.bool else bool(mask.any())


@pytest.mark.parametrize("name", at_hand(CORE, ["vit_msn", "ast"]))
def test_the_masks_of_real_encoders_hide_nothing(name: str) -> None:
    captured = capture_module(make_model(name), make_inputs(name))
    attentions = [a.result for a in find_attentions(captured.graph.graph)[0]]
    assert attentions
    for attention in attentions:
        mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
        assert mask is None or hides_nothing(mask)


def test_a_constant_is_worked_out_and_the_rest_is_not() -> None:
    def compute(x: Tensor, parameter: Tensor) -> tuple[Tensor, ...]:
        constant = torch.arange(4) * 2 + 1
        return constant, constant + x.shape[0], x + 1, parameter * 2

    module = capture(compute, torch.randn(3, 4), torch.ones(4), dynamic=(0,))
    results = module.graph.output_node().args[0]
    first, *others = (constant_value(node) for node in results)
    assert first is not None
    assert first.tolist() == [1, 3, 5, 7]
    assert others == [None, None, None]
    assert all(constant_value(node) is None for node in module.graph.find_nodes(op="placeholder"))


def test_working_a_constant_out_draws_no_random_number() -> None:
    masks = [captured_mask(MAY_HIDE[n]) for n in ("drawn", "likely-true", "dropped-out")]
    state = torch.get_rng_state()
    assert not any(map(hides_nothing, masks))
    assert torch.equal(torch.get_rng_state(), state)
