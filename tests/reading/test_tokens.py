"""Where tokens go, operator by operator, and what each reader is found to need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from tomepass.graphs.canonical import CanonicalGraph
from tomepass.reading.axis import Axis
from tomepass.reading.layouts import (
    Attended,
    Averaged,
    Carried,
    Contracted,
    Joined,
    Layout,
    Masked,
    Outcome,
    Positional,
    Taken,
    Weighed,
)
from tomepass.reading.tokens import TokenFlow, follow_tokens

BATCH, TOKENS, WIDTH = 2, 10, 12
PROTECTED = (0, 1, 9)
ALL = tuple(range(TOKENS))


def followed(
    function: Callable[..., Any], *others: Tensor, tokens: int = TOKENS, width: int = WIDTH
) -> tuple[TokenFlow, fx.Graph]:
    """The analysis of a function of tokens ``[B, N, C]``."""
    x = torch.randn(BATCH, tokens, width)
    module = make_fx(function, tracing_mode="fake", pre_dispatch=True)(x, *others)
    graph = module.graph
    inputs = frozenset(n.name for n in graph.find_nodes(op="placeholder"))
    captured = CanonicalGraph(module, inputs, fragment=False)
    layout = Layout(Axis(1), Axis(0), tuple(range(tokens)))
    protected = tuple(p for p in PROTECTED if p < tokens)
    return follow_tokens(captured, next(iter(graph.nodes)), layout, protected), graph


def outcomes(function: Callable[..., Any], *others: Tensor, **sizes: int) -> list[Outcome]:
    """What each reader needs, slices that take everything left out."""
    flow, _ = followed(function, *others, **sizes)
    whole = (torch.ops.aten.slice.Tensor,)
    return [
        o
        for n, o in flow.outcomes.items()
        if not (n.target in whole and isinstance(o, (Carried, Taken)) and _everything(o))
    ]


def _everything(outcome: Carried | Taken) -> bool:
    return outcome.layout is not None and len(outcome.layout.positions) == TOKENS


def only(function: Callable[..., Any], *others: Tensor, **sizes: int) -> Outcome:
    (outcome,) = outcomes(function, *others, **sizes)
    return outcome


# ---- reading protected tokens ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "positions"),
    [
        (lambda x: x[:, 0], (0,)),
        (lambda x: x[:, -1], (9,)),
        (lambda x: x[:, 1], (1,)),
        (lambda x: x.select(-2, -1), (9,)),
        (lambda x: x[:, :2], (0, 1)),
        (lambda x: x[:, 9:], (9,)),
        (lambda x: x[:, -1:], (9,)),
        (lambda x: x[:, 0:1], (0,)),
        (lambda x: x[:, :0], ()),
    ],
)
def test_protected_tokens_can_be_taken(
    read: Callable[[Tensor], Tensor], positions: tuple[int, ...]
) -> None:
    outcome = only(read)
    assert isinstance(outcome, Taken)
    assert outcome.positions == positions
    assert outcome.layout is None


@pytest.mark.parametrize(
    ("read", "positions"),
    [
        (lambda x: x[:, 1:], ALL[1:]),
        (lambda x: x[:, 2:], ALL[2:]),
        (lambda x: x[:, :-1], ALL[:-1]),
        (lambda x: x[:, 2:-1], ALL[2:-1]),
    ],
)
def test_protected_tokens_can_be_left_out(
    read: Callable[[Tensor], Tensor], positions: tuple[int, ...]
) -> None:
    flow, graph = followed(read)
    (output,) = graph.output_node().all_input_nodes
    assert flow.layouts[output].positions == positions


def test_a_slice_of_a_slice_counts_from_the_first() -> None:
    flow, graph = followed(lambda x: x[:, 1:][:, 1:][:, :-1])
    (output,) = graph.output_node().all_input_nodes
    assert flow.layouts[output].positions == ALL[2:-1]
    outcome = outcomes(lambda x: x[:, 1:][:, 0])[-1]
    assert isinstance(outcome, Taken)
    assert outcome.positions == (1,)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[:, 5],
        lambda x: x[:, 2:5],
        lambda x: x[:, :5],
        lambda x: x[:, 3:],
        lambda x: x[:, ::2],
        lambda x: x[:, [0, 1]],
        lambda x: x.flip(1),
        lambda x: x.roll(1, 1),
        lambda x: x.cumsum(1),
        lambda x: x.sum(1),
        lambda x: x.amax(1),
        lambda x: x.mean((1, 2)),
        lambda x: x.mean(),
        lambda x: x.var(1),
        lambda x: x.unfold(1, 2, 2),
        lambda x: x.view(2, 2, 5, 12),
        lambda x: x.view(2, 5, 24),
        lambda x: x.view(4, 5, 12),
        lambda x: torch.cat([x, x], 1),
        lambda x: x[:, :, None] - x[:, None],
        lambda x: F.layer_norm(x, (10, 12)),
        lambda x: F.pad(x, (0, 0, 1, 0)),
        lambda x: x.sort(1).values,
        lambda x: x.argmax(1),
        lambda x: F.conv1d(x.transpose(1, 2), torch.ones(1, 12, 3)),
    ],
)
def test_reading_by_position_needs_the_original_tokens(read: Callable[[Tensor], Any]) -> None:
    flow, graph = followed(read)
    assert any(isinstance(o, Positional) for o in flow.outcomes.values())
    for result in graph.output_node().all_input_nodes:
        assert result not in flow.layouts


# ---- means -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "dim", "keepdim"),
    [
        (lambda x: x.mean(1), 1, False),
        (lambda x: x.mean(-2), 1, False),
        (lambda x: x.mean(dim=[1], keepdim=True), 1, True),
        (lambda x: x.mean(1, True, dtype=torch.float64), 1, True),
        (lambda x: x.transpose(1, 2).mean(-1), 2, False),
        (lambda x: x[:, 2:-1].mean(1), 1, False),
        (lambda x: x.unsqueeze(1).mean(2), 2, False),
    ],
)
def test_a_mean_over_tokens_is_one(
    mean: Callable[[Tensor], Tensor], dim: int, keepdim: bool
) -> None:
    assert outcomes(mean)[-1] == Averaged(dim, keepdim)


def test_a_mean_over_something_else_keeps_the_tokens() -> None:
    assert isinstance(only(lambda x: x.mean(-1)), Carried)
    flow, graph = followed(lambda x: x.mean(2))
    (output,) = graph.output_node().all_input_nodes
    assert flow.layouts[output] == Layout(Axis(1), Axis(0), ALL)


# ---- carrying --------------------------------------------------------------------------------


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], 3, -1).transpose(1, 2)


@pytest.mark.parametrize(
    ("function", "tokens", "batch"),
    [
        (heads, Axis(2), Axis(0)),
        (lambda x: heads(x).transpose(1, 2).flatten(2), Axis(1), Axis(0)),
        (lambda x: x.permute(2, 0, 1), Axis(2), Axis(1)),
        (lambda x: x.transpose(0, 1), Axis(0), Axis(1)),
        (lambda x: x.reshape(-1, 12), Axis(0, before=2), Axis(0, after=10)),
        (lambda x: x.reshape(-1, 12).view(2, 10, 12), Axis(1), Axis(0)),
        (lambda x: heads(x).reshape(6, 10, 4), Axis(1), Axis(0, after=3)),
        (lambda x: x.flatten(1), Axis(1, after=12), Axis(0)),
        (lambda x: x.view(2, 10, 3, 2, 2).permute(3, 0, 2, 1, 4)[1], Axis(2), Axis(0)),
        (lambda x: x.view(2, 10, 2, 6).unbind(2)[1], Axis(1), Axis(0)),
        (lambda x: x.chunk(3, -1)[2], Axis(1), Axis(0)),
        (lambda x: x[:, None], Axis(2), Axis(0)),
        (lambda x: x[:, None].expand(-1, 4, -1, -1), Axis(2), Axis(0)),
        (lambda x: torch.stack([x, x], 1), Axis(2), Axis(0)),
        (lambda x: torch.cat([x, 2 * x], -1), Axis(1), Axis(0)),
        (lambda x: F.gelu(x).double().clone(), Axis(1), Axis(0)),
    ],
)
def test_the_token_axis_moves_with_the_data(
    function: Callable[[Tensor], Tensor], tokens: Axis, batch: Axis
) -> None:
    flow, graph = followed(function)
    (output,) = graph.output_node().all_input_nodes
    assert flow.layouts[output] == Layout(tokens, batch, ALL)


def test_equal_sizes_are_not_confused() -> None:
    # As many tokens as channels, as images, as heads: only the flow of data tells them apart.
    for tokens, width in ((12, 12), (2, 12), (3, 12)):
        flow, graph = followed(heads, tokens=tokens, width=width)
        (output,) = graph.output_node().all_input_nodes
        assert (flow.layouts[output].tokens, flow.layouts[output].batch) == (Axis(2), Axis(0))
    flow, graph = followed(lambda x: x.transpose(1, 2) + x, tokens=12)
    (output,) = graph.output_node().all_input_nodes
    assert output not in flow.layouts


def test_a_literal_count_is_found_in_the_shape_argument() -> None:
    flow, _ = followed(lambda x: x.view(2, 10, 3, 4).permute(2, 0, 1, 3).reshape(3, 20, 4))
    carried = {n.target: o for n, o in flow.outcomes.items() if isinstance(o, Carried)}
    found = {target: [entry for entry, _ in o.sizes] for target, o in carried.items()}
    aten = torch.ops.aten
    assert found[aten.view.default] == [1]
    assert found[aten.permute.default] == []
    reshaped = found.get(aten.reshape.default, found.get(aten._unsafe_view.default))
    assert reshaped == [1]


# ---- operands with a row a token -------------------------------------------------------------


@pytest.mark.parametrize("shape", [(10, 12), (1, 10, 12), (2, 10, 1), (10, 1)])
def test_an_operand_with_a_row_a_token_is_seen(shape: tuple[int, ...]) -> None:
    outcome = only(lambda x, side: x + side, torch.randn(shape))
    assert isinstance(outcome, Carried)
    assert len(outcome.sides) == 1


@pytest.mark.parametrize("shape", [(12,), (1, 12), (1, 1, 1), (2, 1, 12), ()])
def test_an_operand_alike_for_all_tokens_is_none(shape: tuple[int, ...]) -> None:
    outcome = only(lambda x, side: x * side, torch.randn(shape))
    assert isinstance(outcome, Carried)
    assert not outcome.sides


# ---- attention -------------------------------------------------------------------------------


def attend(x: Tensor, *others: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(heads(x), heads(x), heads(x), *others, **options)


def last(function: Callable[..., Any], *others: Tensor) -> Outcome:
    return outcomes(function, *others)[-1]


def test_attention_among_all_tokens_is_attended() -> None:
    layout = Layout(Axis(2), Axis(0), ALL)
    assert last(attend) == Attended(layout, layout)
    assert last(lambda x: attend(x, scale=0.5)) == last(attend)


@pytest.mark.parametrize(
    "hides",
    [
        lambda x: attend(x, is_causal=True),
        lambda x: attend(x, None, 0.0, True),
        lambda x: attend(x, attn_mask=torch.ones(10, 10, dtype=torch.bool).tril()),
        lambda x: attend(x, torch.zeros(10, 10).fill_diagonal_(-1.0)),
        lambda x: attend(x, (x[..., 0] > 0)[:, None, None]),
    ],
)
def test_attention_that_may_hide_tokens_is_masked(hides: Callable[[Tensor], Tensor]) -> None:
    outcome = last(hides)
    assert isinstance(outcome, Masked)
    assert outcome.advice


def test_a_given_mask_is_not_trusted() -> None:
    assert isinstance(last(attend, torch.ones(10, 10, dtype=torch.bool)), Masked)


@pytest.mark.parametrize(
    "hides_nothing",
    [
        lambda x: attend(x, torch.ones(10, 10, dtype=torch.bool)),
        lambda x: attend(x, attn_mask=torch.zeros(1, 1, 10, 10)),
        lambda x: attend(x, (torch.arange(10) >= 0)[None, None, None].expand(2, 3, 10, 10)),
    ],
)
def test_a_mask_that_provably_hides_nothing_is_none(
    hides_nothing: Callable[[Tensor], Tensor],
) -> None:
    assert isinstance(last(hides_nothing), Attended)


def test_attention_of_other_queries_to_all_tokens_pools_them() -> None:
    def pooled(x: Tensor, probe: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(probe, heads(x), heads(x))

    assert last(pooled, torch.randn(2, 3, 1, 4)) == Attended(None, Layout(Axis(2), Axis(0), ALL))


def scores(x: Tensor) -> Tensor:
    return x @ x.clone().transpose(1, 2)


def test_scores_hold_tokens_twice_and_softmax_makes_them_weights() -> None:
    pair = Layout(Axis(1), Axis(0), ALL, Axis(2))
    assert last(scores) == Carried(pair)
    assert last(lambda x: scores(x).mul(0.5)[:, None].softmax(-1)) == Weighed(
        Layout(Axis(2), Axis(0), ALL, Axis(3), weights=True)
    )
    attended = last(lambda x: scores(x).softmax(-1) @ x)
    assert attended == Carried(Layout(Axis(1), Axis(0), ALL))


def test_a_product_that_adds_rows_of_its_own_needs_the_original_tokens() -> None:
    # A pooling head's mask, added inside the product of its probe and the keys.
    def pooled(x: Tensor, probe: Tensor, mask: Tensor) -> Tensor:
        return torch.baddbmm(mask, probe, x.transpose(1, 2)).softmax(-1)

    probe = torch.randn(BATCH, 1, WIDTH)
    assert isinstance(outcomes(pooled, probe, torch.zeros(BATCH, 1, TOKENS))[1], Positional)
    assert isinstance(outcomes(pooled, probe, torch.zeros(BATCH, 1, 1))[-1], Weighed)


def test_weights_of_the_tokens_alone_pool_them() -> None:
    assert last(lambda x: x.softmax(1)) == Weighed(Layout(Axis(1), Axis(0), ALL, weights=True))
    assert last(lambda x: (x.softmax(1) * x).sum(1)) == Contracted()
    assert last(lambda x: x.softmax(1).transpose(1, 2) @ x) == Contracted()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: scores(x) @ x,  # no softmax: sums over tokens
        lambda x: scores(x).softmax(1) @ x,  # over the queries
        lambda x: (scores(x).softmax(-1) + 0.1) @ x,
        lambda x: scores(x).softmax(-1).square() @ x,
        lambda x: scores(x).softmax(-1).softmax(-1) @ x,
        lambda x: scores(x).softmax(-1).mean(-1),
        lambda x: scores(x).softmax(-1)[:, :, 1:] @ x[:, 1:],
        lambda x: (scores(x) + torch.full((10, 10), -torch.inf).triu(1)).softmax(-1) @ x,
        lambda x: scores(x).masked_fill(x[:, None, :, 0] > 0, -1e9).softmax(-1) @ x,
        # Twice the weights are not twice the result.
        lambda x: scores(x)[..., None].softmax(2).softmax(-1)[..., 0] @ x,
        lambda x: F.layer_norm(scores(x)[..., None].softmax(2), (1,))[..., 0] @ x,
        lambda x: scores(x).softmax(-1)[..., None].prod(-1) @ x,
        lambda x: torch.stack([scores(x).softmax(-1)] * 2).var(0) @ x,
        lambda x: (scores(x).softmax(-1) * 1).mul(2).long().to(x.dtype) @ x,
        lambda x: (w := scores(x).softmax(-1)).mul(w) @ x,
        lambda x: torch.div(x.new_ones(()), scores(x).softmax(-1)) @ x,
        # All of a row hidden forgets the sizes: a float as large has no room for log(size).
        lambda x: scores(x).masked_fill(scores(x) < 0, -1e9).softmax(-1) @ x,
        lambda x: torch.where(scores(x) < 0, -1e9, scores(x)).softmax(-1) @ x,
    ],
)
def test_what_is_nearly_an_attention_needs_the_original_tokens(function: Any) -> None:
    flow, graph = followed(function)
    assert any(isinstance(o, Positional) for o in flow.outcomes.values())
    (result,) = graph.output_node().all_input_nodes
    assert result not in flow.layouts


def test_tokens_parted_and_joined_again_are_one_sequence() -> None:
    whole = Layout(Axis(1), Axis(0), ALL)

    def turned(x: Tensor) -> Tensor:
        first, rest, final = x.split((2, 7, 1), dim=1)
        return torch.cat([first, 2 * rest, final.clone()], dim=1)

    assert last(turned) == Joined(whole, (ALL[:2], ALL[2:9], ALL[9:]))
    for other in (
        lambda x: torch.cat([x[:, 2:], x[:, :2]], dim=1),
        lambda x: torch.cat([x[:, :2], x[:, 2:], x[:, :2]], dim=1),
        lambda x: torch.cat([x[:, :2].flip(1), x[:, 2:]], dim=1),
        lambda x: torch.cat([torch.zeros(2, 2, 12), x[:, 2:]], dim=1),
        lambda x: torch.cat(x.split((3, 7), dim=1), dim=1),
    ):
        assert isinstance(last(other), Positional)


def test_sides_say_how_merged_tokens_meet_them() -> None:
    table, bias = torch.randn(10, 12), torch.randn(10, 10)

    def how(function: Any, *others: Tensor) -> list[str]:
        (outcome,) = [o for o in outcomes(function, *others) if getattr(o, "sides", ())]
        assert isinstance(outcome, Carried)
        return [side.how for side in outcome.sides]

    assert how(lambda x, t: x + t, table) == ["mean"]
    assert how(lambda x, t: x * t, table) == ["kept"]
    assert how(lambda x: x + x.roll(1, 1)) == ["read"]
    assert how(lambda x: scores(x) + torch.zeros(10, 10)) == ["nothing"]
    assert how(lambda x: scores(x) + torch.ones(10, 10)) == ["bias"]
    # An input may be a mask; what is compared or clamped to rows of its own is none of these.
    assert isinstance(last(lambda x, b: scores(x) + b, bias), Masked)
    assert isinstance(last(lambda x, t: torch.maximum(x, t), table), Positional)


def test_attention_to_or_from_something_else_is_positional() -> None:
    def crossed(x: Tensor, memory: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(heads(x), memory, memory)

    def over_time(x: Tensor) -> Tensor:
        y = heads(x).transpose(0, 2)
        return F.scaled_dot_product_attention(y, y, y)

    for outcome in (last(crossed, torch.randn(2, 3, 8, 4)), last(over_time)):
        assert isinstance(outcome, Positional)
        assert not isinstance(outcome, Masked)
