"""Transfer rules of an axis, against what operators do.

The oracle knows no rule: it changes one token of an input and looks which elements of a result
change. A rule that names an axis claims that those elements lie in the token's slice of it; a
rule that refuses claims that there is no such axis.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from profiles import examples
from torch import Tensor, fx
from tracing import capture

from tomepass.graphs.nodes import exact_quotient, same, shape_of
from tomepass.reading.axis import Axis, move

Function = Callable[..., Any]
Outcomes = dict[fx.Node, Axis | str]


def follow(graph: fx.Graph, dim: int) -> Outcomes:
    """What the rules say of each node that dimension ``dim`` of the first input reaches."""
    entry = next(iter(graph.nodes))
    length = shape_of(entry)[dim]
    outcomes: Outcomes = {entry: Axis(dim)}
    for node in graph.nodes:
        holders = [a for a in node.all_input_nodes if isinstance(outcomes.get(a), Axis)]
        if node.op != "call_function" or not holders:
            continue
        if node.target is operator.getitem:
            outcomes[node] = outcomes[holders[0]]
        elif isinstance(node.meta["val"], (Tensor, tuple, list)):
            moved = [move(node, a, outcomes[a], length) for a in holders]  # type: ignore[arg-type]
            reasons = [m for m in moved if isinstance(m, str)]
            differ = any(m != moved[0] for m in moved)
            outcomes[node] = (
                reasons[0] if reasons else "laid out differently" if differ else moved[0]
            )
    return outcomes


class Values(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def changes(
    module: fx.GraphModule, inputs: tuple[Tensor, ...], dim: int
) -> list[dict[fx.Node, Any]]:
    """For each token, which elements of each node's floating-point value change with it."""

    def run(first: Tensor) -> dict[fx.Node, Any]:
        values = Values(module)
        values.run(first, *inputs[1:])
        return values.values

    base = run(inputs[0])
    found = []
    for token in range(inputs[0].shape[dim]):
        changed = inputs[0].clone()
        changed.select(dim, token).mul_(1.25).add_(10.0)
        found.append(
            {
                node: value != base[node]
                for node, value in run(changed).items()
                if isinstance(value, Tensor) and value.is_floating_point()
            }
        )
    return found


def hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def in_slice(changed: Tensor, dim: int, after: int, length: int, token: int) -> bool:
    """Do the changes, and there are some, lie where a factor of ``dim`` is at ``token``?"""
    place = torch.arange(changed.shape[dim]) // after % length
    elsewhere = changed.index_select(dim, (place != token).nonzero().flatten())
    return bool(changed.any()) and not bool(elsewhere.any())


def fitting_axes(changed: list[Tensor]) -> Iterator[tuple[int, int]]:
    """All (dim, after) along which a value keeps its tokens apart, found by trying."""
    length = len(changed)
    for dim, size in enumerate(changed[0].shape):
        for after in range(1, size // length + 1):
            if size % (length * after) == 0 and all(
                in_slice(c, dim, after, length, token) for token, c in enumerate(changed)
            ):
                yield dim, after


def verify(
    function: Function,
    *inputs: Tensor,
    dim: int,
    dynamic: tuple[int, ...] = (),
    cautious: bool = False,
) -> Axis | str:
    """Checks every rule's answer on the way through a function; returns the last one."""
    module = capture(function, *inputs, dynamic=dynamic)
    outcomes, found = follow(module.graph, dim), changes(module, inputs, dim)
    length = inputs[0].shape[dim]
    last: Axis | str = "nothing"
    refused: set[fx.Node] = set()
    for node in module.graph.nodes:
        if any(a in refused for a in node.all_input_nodes):
            refused.add(node)  # what a refused value mixed stays mixed
            continue
        if node not in outcomes:
            continue
        last = outcome = outcomes[node]
        if isinstance(outcome, str):
            refused.add(node)
        changed = [by_node[node] for by_node in found if node in by_node]
        if not any(c.any() for c in changed):
            continue  # several results at once, or none that depends on the input
        if isinstance(outcome, str):
            assert cautious or not list(fitting_axes(changed)), f"{node.format_node()}: {outcome}"
            continue
        before, after = hint(outcome.before), hint(outcome.after)
        assert changed[0].shape[outcome.dim] == before * length * after, node.format_node()
        for token, elements in enumerate(changed):
            assert in_slice(elements, outcome.dim, after, length, token), (
                f"token {token} leaves {outcome} in {node.format_node()}"
            )
    return last


def example(*shape: int, seed: int = 0) -> Tensor:
    """Positive, or a square root would be no number; float64, or a change could be rounded off."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.5


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


class Case(NamedTuple):
    function: Function
    shape: tuple[int, ...] = (3, 5, 8)
    weights: tuple[tuple[int, ...], ...] = ()
    cautious: tuple[int, ...] = ()  # dimensions refused though an axis could be named


# Every dimension of the input in turn is the axis, so each case holds rules and refusals both.
CASES = {
    # pointwise
    "gelu": Case(lambda x: F.gelu(x)),
    "silu-mul": Case(lambda x: F.silu(x) * x),
    "residual": Case(lambda x: x + torch.tanh(x)),
    "in-place": Case(lambda x: x.clone().add_(1.0).mul_(2.0)),
    "broadcast": Case(lambda x, w: x * w, weights=((8,),)),
    "broadcast-to-more": Case(lambda x, w: x + w, weights=((2, 3, 5, 8),)),
    "broadcast-of-the-input": Case(lambda x, w: x + w, (5, 8), ((3, 5, 8),)),
    "broadcast-of-one": Case(lambda x, w: x + w, (3, 1, 8), ((3, 5, 8),)),
    "where": Case(lambda x, w: torch.where(w > 0.7, x, -x), weights=((5, 8),)),
    "masked-fill": Case(lambda x, w: x.masked_fill(w > 9, 0.0), weights=((5, 1),)),
    "clamp": Case(lambda x: x.clamp(min=0.1)),
    "to": Case(lambda x: x.to(torch.float32).double().contiguous().clone().detach()),
    "dropout": Case(lambda x: F.dropout(x, 0.5, training=False)),
    "type-as": Case(lambda x: (2 * x.float()).type_as(x)),
    "expand": Case(lambda x: x[:, None].expand(-1, 4, -1, -1)),
    "expand-in-front": Case(lambda x: x.expand(2, 3, 5, 8)),
    "expand-one": Case(lambda x: x.expand(3, 5, 8), (3, 1, 8)),
    "normalize": Case(lambda x: F.normalize(x, dim=-1)),
    "normalize-heads": Case(lambda x: F.normalize(x.unflatten(-1, (2, 4)), dim=-1)),
    # products
    "linear": Case(lambda x, w, b: F.linear(x, w, b), weights=((6, 8), (6,))),
    "linear-as-weight": Case(lambda x, w: F.linear(w, x), (5, 8), ((3, 8),), (0,)),
    "linear-with-itself": Case(lambda x: F.linear(x, x), (5, 8)),
    "matmul-left": Case(lambda x, w: x @ w, weights=((8, 5),)),
    "matmul-right": Case(lambda x, w: w @ x, weights=((5, 5),)),
    "matmul-batched": Case(lambda x, w: x @ w, weights=((3, 8, 5),)),
    "matmul-batch-broadcast": Case(lambda x, w: x @ w, (1, 5, 8), ((3, 8, 4),)),
    "matmul-vector": Case(lambda x, w: x @ w, weights=((8,),)),
    "vector-matmul": Case(lambda x, w: w @ x, weights=((5,),)),
    "matmul-of-vector": Case(lambda x, w: x @ w, (8,), ((8, 5),)),
    "matmul-by-vector": Case(lambda x, w: w @ x, (8,), ((3, 5, 8),)),
    "matmul-with-itself": Case(lambda x: x @ x, (5, 5)),
    "bmm": Case(lambda x, w: torch.bmm(x, w), weights=((3, 8, 5),)),
    "mm": Case(lambda x, w: x.mm(w), (5, 8), ((8, 5),)),
    "scores": Case(lambda x, w: x @ w.transpose(-1, -2), (3, 2, 5, 4), ((3, 2, 5, 4),)),
    "einsum": Case(lambda x, w: torch.einsum("bnc,dc->bdn", x, w), weights=((5, 8),)),
    "einsum-batched": Case(
        lambda x, w: torch.einsum("b n c, b m c -> b m n", x, w), weights=((3, 5, 8),)
    ),
    "einsum-diagonal": Case(
        lambda x, w: torch.einsum("nnc,c->nc", x, w), (5, 5, 8), ((8,),), (0, 1)
    ),
    # norms and softmax
    "layer-norm": Case(lambda x, w, b: F.layer_norm(x, (8,), w, b), weights=((8,), (8,))),
    "layer-norm-of-two": Case(lambda x: F.layer_norm(x, (5, 8))),
    "native-layer-norm": Case(lambda x: torch.native_layer_norm(x, [8], None, None, 1e-5)[0]),
    "rms-norm": Case(lambda x, w: F.rms_norm(x, (8,), w), weights=((8,),)),
    "norm-by-hand": Case(
        lambda x: (x - x.mean(-1, keepdim=True)) * (x.var(-1, False, keepdim=True) + 1).rsqrt()
    ),
    "softmax-last": Case(lambda x: x.softmax(-1)),
    "softmax-middle": Case(lambda x: F.softmax(x, dim=1, dtype=torch.float64)),
    "log-softmax": Case(lambda x: x.log_softmax(0)),
    "cumsum": Case(lambda x: x.cumsum(1)),
    "glu": Case(lambda x: F.glu(x)),
    "glu-middle": Case(lambda x: F.glu(x, 1), (3, 6, 8)),
    # reductions
    "mean": Case(lambda x: x.mean(1)),
    "mean-keepdim": Case(lambda x: x.mean(1, keepdim=True)),
    "mean-of-two": Case(lambda x: x.mean((0, -1))),
    "sum-first": Case(lambda x: x.sum(0)),
    "sum-of-none-is-of-all": Case(lambda x: x.sum(dim=[])),
    "amax": Case(lambda x: x.amax(-1)),
    "amax-of-all": Case(lambda x: x.amax()),
    "max": Case(lambda x: x.max(-1)[0]),
    "max-middle": Case(lambda x: x.max(1)[0]),
    "logsumexp": Case(lambda x: x.logsumexp(1)),
    "var": Case(lambda x: x.var(-1)),
    "std": Case(lambda x: x.std(1)),
    "norm": Case(lambda x: x.norm(dim=-1)),
    "norm-of-all": Case(lambda x: x.norm()),
    "var-mean": Case(lambda x: torch.var_mean(x, 0)[1]),
    # positions
    "select": Case(lambda x: x[:, 0]),
    "select-last": Case(lambda x: x[..., 3]),
    "slice-others": Case(lambda x: x[1:, :, ::2]),
    "slice-all": Case(lambda x: x[:, :5]),
    "slice-some": Case(lambda x: x[:, 1:]),
    "unbind": Case(lambda x: x.unbind(0)[1]),
    "unbind-middle": Case(lambda x: x.unbind(1)[1]),
    "split": Case(lambda x: x.split(4, -1)[1]),
    "split-sizes": Case(lambda x: x.split([1, 4], 1)[1]),
    "split-first": Case(lambda x: x.split(2)[0]),
    "chunk": Case(lambda x: x.chunk(2, -1)[0]),
    "chunk-first": Case(lambda x: x.chunk(3)[0]),
    "tensor-split": Case(lambda x: x.tensor_split(3, -1)[0]),
    "narrow": Case(lambda x: x.narrow(-1, 2, 3)),
    "narrow-middle": Case(lambda x: x.narrow(1, 1, 3)),
    "index-select": Case(lambda x, i: x.index_select(2, i.long()), weights=((3,),)),
    "index": Case(lambda x, i: x[:, i.long()], (3, 5, 8), ((5,),), (0, 2)),
    "flip-last": Case(lambda x: x.flip(-1)),
    "flip-middle": Case(lambda x: x.flip(1)),
    "flip-two": Case(lambda x: x.flip(0, 2)),
    "roll": Case(lambda x: x.roll(1, 1), (4, 5, 8)),
    "roll-two": Case(lambda x: x.roll((1, 2), (1, 0))),
    # joins
    "cat-channels": Case(lambda x: torch.cat([x, 2 * x], -1), cautious=(2,)),
    "cat-tokens": Case(lambda x, w: torch.cat([w, x], 1), weights=((3, 2, 8),)),
    "concat": Case(lambda x, w: torch.concat([w, x], 2), weights=((3, 5, 4),)),
    "concatenate": Case(lambda x: torch.concatenate([x, x]), cautious=(0,)),
    "stack": Case(lambda x: torch.stack([x, -x])),
    "stack-middle": Case(lambda x: torch.stack([x, -x], 2)),
    "stack-last": Case(lambda x: torch.stack([x, -x], -1)),
    "repeat": Case(lambda x: x.repeat(1, 1, 2), cautious=(2,)),
    "repeat-in-front": Case(lambda x: x.repeat(2, 1, 1, 1)),
    "tile": Case(lambda x: x.tile(2), cautious=(2,)),
    "repeat-interleave": Case(lambda x: x.repeat_interleave(2, 2), cautious=(2,)),
    # order of dimensions
    "transpose": Case(lambda x: x.transpose(1, 2)),
    "transpose-negative": Case(lambda x: x.transpose(-1, 0)),
    "swapaxes": Case(lambda x: x.swapaxes(0, 1).swapdims(1, 2)),
    "permute": Case(lambda x: x.permute(2, 0, 1)),
    "movedim": Case(lambda x: x.movedim(0, 2)),
    "movedim-back": Case(lambda x: x.movedim(-1, 0)),
    "movedim-many": Case(lambda x: x.movedim((0, 1), (2, 0)), (3, 5, 4, 2)),
    "moveaxis": Case(lambda x: torch.moveaxis(x, 1, -1)),
    "t": Case(lambda x: x.t(), (5, 8)),
    "t-of-a-vector": Case(lambda x: x.t(), (5,)),
    "mT": Case(lambda x: x.mT),
    "T": Case(lambda x: x.T, (5, 8)),
    # dimensions of one
    "unsqueeze": Case(lambda x: x[:, None, :, None]),
    "unsqueeze-last": Case(lambda x: x.unsqueeze(-1)),
    "squeeze": Case(lambda x: x.squeeze(1), (3, 1, 5, 8)),
    "squeeze-none": Case(lambda x: x.squeeze(1)),
    "squeeze-some": Case(lambda x: x.squeeze((0, 2)), (3, 5, 1, 8)),
    "squeeze-all": Case(lambda x: x.squeeze(), (3, 1, 5, 1, 8)),
    # views
    "fold": Case(lambda x: x.view(-1, 8)),
    "fold-and-back": Case(lambda x: x.reshape(-1, 8).sin().view(x.shape)),
    "fold-all": Case(lambda x: x.reshape(-1)),
    "ravel": Case(lambda x: x.ravel()),
    "flatten": Case(lambda x: x.flatten(1)),
    "flatten-middle": Case(lambda x: x.flatten(1, 2), (3, 2, 5, 4)),
    "unflatten": Case(lambda x: x.unflatten(-1, (2, -1))),
    "unflatten-first": Case(lambda x: x.unflatten(0, (3, 2)), (6, 5, 8)),
    "view-as": Case(lambda x: (x * 2).view_as(x)),
    "splits-tokens": Case(lambda x: x.view(3, 2, 3, 8), (3, 6, 8)),
    "wrong-order": Case(lambda x: x.reshape(x.shape[0], 8, 5)),
    "windows": Case(
        lambda x: x.view(3, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 8), (3, 16, 8)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_rule_names_the_axis_that_is_there_or_none(name: str) -> None:
    case = CASES[name]
    inputs = [example(*shape, seed=i) for i, shape in enumerate((case.shape, *case.weights))]
    for dim, size in enumerate(case.shape):
        if size > 1:
            verify(case.function, *inputs, dim=dim, cautious=dim in case.cautious)


def swiglu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gate, value = F.linear(F.layer_norm(x, (x.shape[-1],)), up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * value, down)


def channels_first(x: Tensor) -> Tensor:
    """Patches of an image to tokens, and back to a map."""
    tokens = x.flatten(2).transpose(1, 2)
    return tokens.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)


# What symbolic sizes must follow: the batch in every form a model gives it.
BATCHED = {
    "fold": (lambda x: x.view(-1, 8), Axis(0, "batch", 1), Axis(0, 1, 5)),
    "fold-by-size": (
        lambda x: x.reshape(x.shape[0] * 5, 8),
        Axis(0, "batch", 1),
        Axis(0, 1, 5),
    ),
    "fold-and-back": (
        lambda x: F.linear(x.reshape(-1, 8), ones(6, 8)).view(x.shape[0], 5, 6),
        Axis(1),
        Axis(0),
    ),
    "fold-and-back-by-minus-one": (lambda x: x.view(-1, 8).view(-1, 5, 8), Axis(1), Axis(0)),
    "fused-heads": (
        lambda x: x.unflatten(-1, (1, 2, 4)).permute(2, 0, 3, 1, 4)[0],
        Axis(2),
        Axis(0),
    ),
    "heads-into-batch": (
        lambda x: x.view(x.shape[0], 5, 2, 4).transpose(1, 2).reshape(-1, 5, 4),
        Axis(1),
        Axis(0, 1, 2),
    ),
    "heads-out-of-batch": (
        lambda x: x.view(x.shape[0], 5, 2, 4).transpose(1, 2).reshape(-1, 5, 4).view(-1, 2, 5, 4),
        Axis(2),
        Axis(0),
    ),
    "tokens-first": (lambda x: x.transpose(0, 1).reshape(5, -1), Axis(0), Axis(1, 1, 8)),
    "flatten-tokens": (lambda x: x.flatten(1), Axis(1, 1, 8), Axis(0)),
    "channels-first": (lambda x: x.transpose(1, 2).unsqueeze(-1), Axis(2), Axis(0)),
    "expand": (lambda x: x[:, None].expand(x.shape[0], 2, -1, -1), Axis(2), Axis(0)),
    "cat-with-expanded": (
        lambda x: torch.cat([x, ones(1, 1, 4).expand(x.shape[0], 5, -1)], dim=2),
        Axis(1),
        Axis(0),
    ),
    "squeeze": (lambda x: x[:, None].squeeze(), Axis(1), Axis(0)),
}


@pytest.mark.parametrize("name", BATCHED)
def test_tokens_and_batch_are_followed_whatever_the_batch(name: str) -> None:
    function, tokens, batch = BATCHED[name]
    x = example(3, 5, 8)
    for dim, expected in ((1, tokens), (0, batch)):
        for dynamic in ((), (0,)):
            got = verify(function, x, dim=dim, dynamic=dynamic)
            assert isinstance(got, Axis), got
            hints = Axis(got.dim, hint(got.before), hint(got.after))
            sizes = {"batch": 3}
            assert hints == Axis(
                expected.dim, sizes.get(expected.before, expected.before), expected.after
            )
            assert got.whole is (expected.before == expected.after == 1)


@pytest.mark.parametrize("dynamic", [(), (0,)], ids=["static", "dynamic"])
def test_a_block_written_as_models_write_it_keeps_its_axes(dynamic: tuple[int, ...]) -> None:
    x = example(3, 5, 8)
    for dim in (0, 1):
        kept = verify(swiglu, x, example(12, 8), example(8, 6), dim=dim, dynamic=dynamic)
        assert kept == Axis(dim)
    image = example(2, 4, 3, 6)
    assert verify(channels_first, image, dim=0) == Axis(0)
    assert verify(channels_first, image, dim=3) == Axis(2, 3, 1)


def test_installs_no_guard_on_the_batch() -> None:
    module = capture(
        lambda x: x.view(-1, 8).view(x.shape[0], 5, 2, 4), example(3, 5, 8), dynamic=(0,)
    )
    (entry,) = module.graph.find_nodes(op="placeholder")
    env = shape_of(entry)[0].node.shape_env
    guards = len(env.guards)
    for dim in (0, 1):
        assert all(isinstance(o, Axis) for o in follow(module.graph, dim).values())
    assert not same(shape_of(entry)[0], 3)
    assert exact_quotient(shape_of(entry)[0], 3) is None
    assert len(env.guards) == guards


# Any chain of moves


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[str], Callable[[Tensor], Tensor], tuple[int, ...]]:
    """A random chain of operators that move, fold, join and mix dimensions."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4).map(tuple))
    assume(1 < prod(shape) <= 300)
    names: list[str] = []
    functions: list[Callable[[Tensor], Tensor]] = []
    current = torch.empty(shape, dtype=torch.float64)
    for _ in range(draw(st.integers(1, 6))):
        name, function = draw(one_step(tuple(current.shape)))
        current = function(current)
        if current.numel() > 600 or current.ndim > 6:
            break
        names.append(name)
        functions.append(function)

    def chain(x: Tensor) -> Tensor:
        for function in functions:
            x = function(x)
        return x

    return names, chain, shape


KINDS = (
    *("view", "permute", "transpose", "movedim", "unsqueeze", "squeeze", "expand", "repeat"),
    *("flip", "softmax", "cumsum", "sum", "select", "stack", "linear"),
)


@st.composite
def one_step(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[str, Callable[[Tensor], Tensor]]:
    ndim = len(shape)
    dims = st.integers(0, ndim - 1)
    kind = draw(st.sampled_from(KINDS))
    if kind in ("unsqueeze", "stack"):
        at = draw(st.integers(0, ndim))
        if kind == "stack":
            return f"stack {at}", lambda x: torch.stack([x, 2 * x], at)
        return f"unsqueeze {at}", lambda x: x.unsqueeze(at)
    if ndim == 0:
        return "double", lambda x: x * 2
    a, b = draw(dims), draw(dims)
    order = draw(st.permutations(range(ndim)))
    target = draw(other_shapes(shape))
    wider = [4 if s == 1 and i == a else s for i, s in enumerate(shape)]
    moves: dict[str, Callable[[Tensor], Tensor]] = {
        "view": lambda x: x.reshape(target),
        "permute": lambda x: x.permute(order),
        "transpose": lambda x: x.transpose(a, b),
        "movedim": lambda x: x.movedim(a, b),
        "squeeze": lambda x: x.squeeze(a),
        "expand": lambda x: x.expand(wider),
        "flip": lambda x: x.flip(a),
        "softmax": lambda x: x.softmax(a) * x,  # alone, its sum would not change
        "cumsum": lambda x: x.cumsum(a),
        "sum": lambda x: x.sum((a, b) if a != b else a),
        "select": lambda x: x.select(a, 0),
        "linear": lambda x: F.linear(x, ones(3, shape[-1]).cumsum(-1)),
        "repeat": lambda x: x.repeat([2 if i == a and s == 1 else 1 for i, s in enumerate(shape)]),
    }
    return f"{kind} {a} {b} {order if kind == 'permute' else target}", moves[kind]


@st.composite
def other_shapes(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Another shape of as many elements."""
    left, target = prod(shape), []
    while left > 1 and len(target) < 4:
        target.append(draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
        left //= target[-1]
    return tuple(draw(st.permutations([*target, left])))


@given(steps())
@examples(60)
def test_any_chain_of_moves_is_followed_as_far_as_tokens_stay_apart(
    chain: tuple[list[str], Callable[[Tensor], Tensor], tuple[int, ...]],
) -> None:
    _, function, shape = chain
    for dim, size in enumerate(shape):
        if size > 1:
            verify(function, example(*shape), dim=dim)


# Why not


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.roll(1, 1), "aten.roll works along the axis"),
        (lambda x: x.flip(1), "aten.flip works along the axis"),
        (lambda x: x.cumsum(1), "aten.cumsum works along the axis"),
        (lambda x: x.softmax(1), "aten.softmax works along the axis"),
        (lambda x: x[:, 1:], "aten.slice works along the axis"),
        (lambda x: x.split(2, 1)[0], "aten.split works along the axis"),
        (lambda x: x.chunk(2, 1)[0], "aten.chunk works along the axis"),
        (lambda x: F.glu(x.mT), "aten.glu works along the axis"),
        (lambda x: x[:, 0], "aten.select reads single positions of the axis"),
        (lambda x: x.unbind(1)[0], "aten.unbind reads single positions of the axis"),
        (lambda x: x.mean(1), "aten.mean sums over the axis"),
        (lambda x: x.amax((0, 1)), "aten.amax sums over the axis"),
        (lambda x: x.sum(dim=[]), "aten.sum sums over the axis"),
        (lambda x: F.layer_norm(x, (6, 8)), "a norm mixes along the axis"),
        (lambda x: F.linear(x.mT, ones(2, 6)), "a linear layer mixes along the axis"),
        (lambda x: x.mT @ ones(6, 2), "a matrix product sums over the axis"),
        (lambda x: torch.einsum("bnc,bmc->bnm", x, x), "an einsum of different tensors"),
        (lambda x: torch.einsum("bnc,bn->bc", x, ones(3, 6)), "an einsum sums over the axis"),
        (lambda x: torch.einsum("...c,cd", x, ones(8, 2)), "an explicit result"),
        (lambda x: torch.cat([x, ones(3, 1, 8)], 1), "a cat extends the axis"),
        (lambda x: x.view(3, 2, 3, 8), r"aten.view splits the axis: \[3, 6, 8\] to \[3, 2, 3, 8\]"),
        (lambda x: x.reshape(3, 8, 6), "aten.reshape splits the axis"),
        (lambda x: torch.cdist(x, x), "aten.cdist is not known to keep tokens apart"),
        (lambda x: x.sort(1)[0], "aten.sort is not known to keep tokens apart"),
        (lambda x: F.conv1d(x.mT, ones(8, 8, 3)), "aten.conv1d is not known"),
        (lambda x: x[:, [1, 0, 2, 3, 4, 5]], "aten.index is not known"),
        (lambda x: x.gather(1, (x * 0).long()), "aten.gather is not known"),
        (lambda x: F.pad(x, (0, 0, 1, 1)), "aten.pad is not known"),
    ],
)
def test_a_refusal_says_why(function: Function, reason: str) -> None:
    x = example(3, 6, 8)
    module = capture(function, x)
    reasons = [o for o in follow(module.graph, 1).values() if isinstance(o, str)]
    assert re.search(reason, reasons[0]), reasons


def test_an_axis_is_whole_if_nothing_is_folded_around_it() -> None:
    assert Axis(2).whole
    assert not Axis(2, before=3).whole
    assert not Axis(2, after=3).whole


@pytest.mark.parametrize(
    ("a", "b", "quotient"), [(12, 3, 4), (12, 1, 12), (12, 5, None), (0, 3, 0), (12, 0, None)]
)
def test_an_exact_quotient_is_exact_or_none(a: int, b: int, quotient: int | None) -> None:
    assert exact_quotient(a, b) == quotient
