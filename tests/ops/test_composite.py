"""What holds for every tome:: operator: it is composite, so it runs wherever aten runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from depth import at_hand
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map_only

from tomepass import reference
from tomepass.methods import AdaViT, DynamicViT, Learned
from tomepass.ops.attending.log_size import log_size
from tomepass.ops.attending.soft import masked_attention
from tomepass.ops.dropping.keep_score import drawn, keep_score, keep_score_linear, used_size
from tomepass.ops.dropping.prune import nearest, places
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge, merge_size
from tomepass.ops.merging.side import keep, merge_bias, merge_rows, rows
from tomepass.ops.merging.unmerge import compose, narrow_source, unmerge
from tomepass.ops.merging.weighted_mean import weighted_mean
from tomepass.ops.padding import padded_size, seen_stands

TOKENS, LEFT, CHANNELS = 14, 10, 6


class Example(NamedTuple):
    operator: Any
    arguments: Callable[[int], tuple[Any, ...]]  # from a batch size

    @property
    def name(self) -> str:
        return str(self.operator).removeprefix("tome.").removesuffix(".default")


def keys(batch: int) -> Tensor:
    """Rows of signs with many ties, whose cosines are exact (see test_match.py)."""
    generator = torch.Generator().manual_seed(batch)
    signs = torch.randint(0, 2, (batch, 1, TOKENS, 4), generator=generator) * 2.0 - 1
    return torch.cat([signs + 0.5, signs - 0.5], dim=1)


def hidden(batch: int, tokens: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, tokens, CHANNELS, generator=generator)


def assignment(batch: int) -> Tensor:
    return reference.match(keys(batch), TOKENS - LEFT, (0,))


def sizes(batch: int, tokens: int = TOKENS) -> Tensor:
    return torch.arange(1.0, tokens + 1).repeat(batch, 1)


def hides_four(batch: int) -> Tensor:
    seen = torch.arange(TOKENS) < TOKENS - 4
    return seen.expand(batch, 1, TOKENS, TOKENS)


def policy(kind: type[Learned]) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=drawn) for shape in kind().shapes(CHANNELS).values()]


def some(batch: int) -> Tensor:
    """Positions of tokens kept, a protected one first."""
    return torch.tensor([0, 2, 3, 7, 9]).repeat(batch, 1)


def used(batch: int) -> Tensor:
    return torch.tensor([1.0, 0, 1, 0, 1]).repeat(batch, 1)


EXAMPLES = [
    Example(match, lambda b: (keys(b), TOKENS - LEFT, [0])),
    Example(match, lambda b: (keys(b), 3, [2, 13])),
    Example(match, lambda b: (keys(b), 0, [])),
    Example(merge, lambda b: (hidden(b), None, assignment(b), LEFT)),
    Example(merge, lambda b: (hidden(b), sizes(b), assignment(b), LEFT)),
    Example(merge_size, lambda b: (None, assignment(b), LEFT)),
    Example(merge_size, lambda b: (sizes(b), assignment(b), LEFT)),
    Example(unmerge, lambda b: (hidden(b, LEFT), assignment(b), 1)),
    Example(unmerge, lambda b: (hidden(b, LEFT).mT, assignment(b), 2)),
    Example(compose, lambda b: (None, assignment(b))),
    Example(compose, lambda b: (assignment(b) % TOKENS, assignment(b))),
    Example(narrow_source, lambda b: (assignment(b), list(range(1, TOKENS)), [0])),
    Example(narrow_source, lambda b: (assignment(b), list(range(TOKENS)), [])),
    Example(weighted_mean, lambda b: (hidden(b), sizes(b), 1, False)),
    Example(weighted_mean, lambda b: (hidden(b), sizes(b), 1, True)),
    Example(log_size, lambda b: (sizes(b), torch.ones(b, 2, TOKENS, 3))),
    Example(log_size, lambda b: (sizes(b), torch.ones(b, 2, TOKENS, 3, dtype=torch.bfloat16))),
    Example(match, lambda b: (keys(b), TOKENS - LEFT, [0], padded_size(hides_four(b), hidden(b)))),
    Example(padded_size, lambda b: (hides_four(b), hidden(b))),
    Example(seen_stands, lambda b: (some(b), assignment(b), sizes(b) % 2)),
    Example(keep, lambda b: (None, assignment(b), LEFT, [0])),
    Example(keep, lambda b: (assignment(b) + 1, assignment(b), LEFT, [0])),
    Example(rows, lambda b: (torch.randn(b, 1, TOKENS - 1, 3), assignment(b)[:, 1:], 2, 4, [0])),
    Example(merge_rows, lambda b: (hidden(b), assignment(b), LEFT)),
    Example(merge_bias, lambda b: (torch.randn(b, 2, TOKENS, TOKENS), assignment(b), LEFT)),
    Example(merge_bias, lambda b: (torch.randn(b, 1, TOKENS, 1), assignment(b), LEFT)),
    Example(keep_score, lambda b: (hidden(b), None, policy(DynamicViT), [0])),
    Example(keep_score, lambda b: (hidden(b), sizes(b), policy(DynamicViT), [])),
    Example(keep_score_linear, lambda b: (hidden(b), None, policy(AdaViT), [0])),
    Example(keep_score_linear, lambda b: (hidden(b), sizes(b), policy(AdaViT), [])),
    Example(drawn, lambda b: (hidden(b)[..., 0], TOKENS, 2)),
    Example(used_size, lambda b: (hidden(b)[..., 0], None, some(b), [0])),
    Example(used_size, lambda b: (hidden(b)[..., 0], sizes(b), some(b), [0])),
    Example(places, lambda b: (some(b), TOKENS, used(b))),
    Example(nearest, lambda b: (keys(b), some(b), [0], used(b))),
    Example(masked_attention, lambda b: (*3 * (hidden(b)[:, None],), sizes(b) % 2)),
]
NAMES = [example.name for example in EXAMPLES]
FIRST = [example for i, example in enumerate(EXAMPLES) if example.name not in NAMES[:i]]
every_operator = pytest.mark.parametrize("example", EXAMPLES, ids=NAMES)
# Each operator once; with its other arguments where all tests run.
each_once = pytest.mark.parametrize("example", at_hand(EXAMPLES, FIRST, NAMES))
# What takes long: each operator in one of two tests.
every_other = pytest.mark.parametrize("example", at_hand(EXAMPLES, FIRST[::2], NAMES))
the_others = pytest.mark.parametrize("example", at_hand(EXAMPLES, FIRST[1::2], NAMES))


class One(nn.Module):
    """A model of one operator, called with the operator's tensors; the rest is fixed."""

    def __init__(self, example: Example) -> None:
        super().__init__()
        arguments = example.arguments(2)
        self.operator = example.operator
        self.places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]
        self.fixed = [None if isinstance(a, Tensor) else a for a in arguments]

    def forward(self, *tensors: Tensor) -> Tensor:
        arguments = list(self.fixed)
        for place, tensor in zip(self.places, tensors, strict=True):
            arguments[place] = tensor
        return self.operator(*arguments)


class Chain(nn.Module):
    """All the operators as a merged encoder uses them: two merges, attention, both readouts."""

    def forward(self, keys: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        first = match(keys, 4, [0])
        x, size = merge(x, None, first, 10), merge_size(None, first, 10)
        second = match(x.unflatten(-1, (2, 3)).transpose(1, 2), 3, [0])
        x, size = merge(x, size, second, 7), merge_size(size, second, 7)
        heads = x.unflatten(-1, (2, 3)).transpose(1, 2)
        bias = log_size(size, heads)
        attended = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias)
        x = x + attended.transpose(1, 2).flatten(2)
        source = compose(first, second)
        patches = unmerge(x[:, 1:], narrow_source(source, list(range(1, TOKENS)), [0]), 1)
        return weighted_mean(x, size, 1, False), patches, unmerge(x, source, 1), source


def tensors_of(arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return tuple(a for a in arguments if isinstance(a, Tensor))


def own_operators(module: torch.fx.GraphModule) -> list[str]:
    return [str(n.target) for n in module.graph.nodes if str(n.target).startswith("tome.")]


def assert_same(got: Any, expected: Any) -> None:
    """Index maps and sizes equal to the bit, other values to rounding."""
    for ours, theirs in zip(
        torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected), strict=True
    ):
        assert ours.dtype is theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.deep  # the same checks as below, with nothing to differentiate
@every_operator
def test_opcheck(example: Example) -> None:
    torch.library.opcheck(example.operator, example.arguments(2))


@every_other
def test_a_differentiable_argument_passes_opcheck(example: Example) -> None:
    arguments = tuple(
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in example.arguments(2)
    )
    torch.library.opcheck(example.operator, arguments)


@every_operator
def test_results_own_their_memory_and_leave_the_arguments_as_they_were(example: Example) -> None:
    arguments = example.arguments(2)
    before = [a.clone() for a in tensors_of(arguments)]
    result = example.operator(*arguments)
    if example.operator is not compose or arguments[0] is not None:
        taken = {a.untyped_storage().data_ptr() for a in tensors_of(arguments)}
        assert result.untyped_storage().data_ptr() not in taken
    for argument, then in zip(tensors_of(arguments), before, strict=True):
        assert torch.equal(argument, then)


@every_operator
def test_the_shape_is_known_on_a_meta_device(example: Example) -> None:
    arguments = example.arguments(2)
    expected = example.operator(*arguments)
    meta = example.operator(*tree_map_only(Tensor, lambda a: a.to("meta"), arguments))
    assert (meta.shape, meta.dtype) == (expected.shape, expected.dtype)


@each_once
def test_it_inlines_under_compile_without_a_break(example: Example) -> None:
    compiled = torch.compile(One(example), backend="aot_eager", fullgraph=True)
    arguments = example.arguments(3)
    assert_same(compiled(*tensors_of(arguments)), example.operator(*arguments))


@the_others
def test_it_exports_with_a_dynamic_batch_and_decomposes_into_aten(example: Example) -> None:
    model = One(example)
    given = tensors_of(example.arguments(2))
    batch = torch.export.Dim("batch")
    shapes = (tuple({0: batch} for _ in given),)
    program = torch.export.export(model, given, dynamic_shapes=shapes, strict=False)
    assert own_operators(program.graph_module) == [str(example.operator)]
    decomposed = program.run_decompositions()
    assert own_operators(decomposed.graph_module) == []
    for other in (1, 5):
        arguments = example.arguments(other)
        expected = example.operator(*arguments)
        for stage in (program, decomposed):
            assert_same(stage.module()(*tensors_of(arguments)), expected)


def test_a_chain_exports_with_a_dynamic_batch() -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Chain(), (keys(2), hidden(2)), dynamic_shapes=({0: batch}, {0: batch}), strict=False
    )
    assert len(own_operators(program.graph_module)) == 12
    decomposed = program.run_decompositions()
    assert own_operators(decomposed.graph_module) == []
    for size in (1, 2, 7):
        expected = Chain()(keys(size), hidden(size))
        assert_same(decomposed.module()(keys(size), hidden(size)), expected)


@pytest.mark.deep
@pytest.mark.xdist_group("generated code")
def test_inductor_agrees_for_any_batch_and_to_the_bit_on_ties() -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(Chain(), backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (3, 5, 7):  # not 2: there are two heads
            expected = Chain()(keys(batch), hidden(batch))
            assert_same(compiled(keys(batch), hidden(batch)), expected)
    assert counter.frame_count == 1


def test_a_compiled_chain_differentiates_as_the_eager_one() -> None:
    compiled = torch.compile(Chain(), backend="aot_eager", fullgraph=True)
    gradients = []
    for run in (compiled, Chain()):
        x = hidden(3).requires_grad_()
        pooled, patches, full, _ = run(keys(3), x)
        (pooled.square().sum() + patches.sum() + full.square().sum()).backward()
        gradients.append(x.grad)
    assert_same(*gradients)
    assert bool((gradients[0] != 0).any())


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_autocast_inside_a_compiled_region_does_not_reach_the_operators(backend: str) -> None:
    def run(keys: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            projected = x @ torch.eye(CHANNELS)
            assign = match(keys, 4, [0])
            size = merge_size(None, assign, 10)
            merged = merge(x, size.new_ones(x.shape[:2]), assign, 10)
            return projected, assign, size, merged, weighted_mean(merged, size, 1, False)

    x = hidden(2)
    outputs = torch.compile(run, backend=backend, fullgraph=True)(keys(2), x)
    seen = [o.dtype for o in outputs]
    # The projection shows that autocast was on.
    assert seen == [torch.bfloat16, torch.int64, torch.float32, torch.float32, torch.float32]
    assign = match(keys(2), 4, [0])
    merged = merge(x, None, assign, 10)
    assert_same(outputs[1:4], (assign, merge_size(None, assign, 10), merged))
