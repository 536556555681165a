"""tome::match_by, attention_to, merge_max and mlerp against the plain reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from torch import Tensor, nn

from tomepass import reference
from tomepass.ops.attending.attention_to import attention_to
from tomepass.ops.matching.match import match
from tomepass.ops.matching.match_by import PARTITIONS, match_by
from tomepass.ops.matching.similarity import SIMILARITIES
from tomepass.ops.merging.combine import merge_max, mlerp
from tomepass.ops.padding import PADDED

CHOICES = list(itertools.product(SIMILARITIES, PARTITIONS))
CLEAR = 1e-6


def drawn(images: int, tokens: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features ``[B, 2, N, D]`` and importances ``[B, N]``, both float64."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, 2, tokens, width, generator=generator, dtype=torch.float64)
    return features, torch.rand(images, tokens, generator=generator, dtype=torch.float64)


@examples(60)
@given(st.data())
def test_maps_equal_the_reference(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(2, 30), label="tokens")
    protected = tuple(
        sorted(data.draw(st.sets(st.integers(0, tokens - 1), max_size=4), label="protected"))
    )
    cap = reference.merge_count(tokens, tokens, protected)
    r = data.draw(st.integers(0, cap), label="r")
    if r == 0:
        return
    similarity, partition = data.draw(st.sampled_from(CHOICES), label="choice")
    seed = data.draw(st.integers(0, 9), label="seed") if partition == "random" else 0
    features, own = drawn(2, tokens, 5, data.draw(st.integers(0, 2**30), label="values"))
    weighed = similarity in ("cosine", "euclidean") and data.draw(st.booleans(), label="weighed")
    importance = own if weighed else None
    hidden = torch.zeros(2, tokens, dtype=torch.bool)
    if data.draw(st.booleans(), label="padding"):
        hidden = own > 0.6
    size = torch.where(hidden, PADDED * 1e-3, 1.0)
    edges = reference.Edges(similarity, partition, seed, importance, 0.3)
    margin = reference.match_margin(features, r, protected, edges=edges)
    if not hidden.any() and float(margin.min()) <= CLEAR:
        return
    assign, stands = match_by(
        features, r, list(protected), size, importance, 0.3, similarity, partition, seed
    )
    expected = reference.match(features, r, protected, padding=hidden, edges=edges)
    assert torch.equal(assign, expected)
    assert torch.equal(stands, reference.kept(expected, protected, tokens - r, edges))


@pytest.mark.parametrize("r", [1, 4, 9])
def test_the_paper_s_choices_are_the_plain_match(r: int) -> None:
    features, _ = drawn(3, 20, 8, r)
    got, _ = match_by(features.float(), r, [0], None, None, 0.3, "cosine", "alternating", 0)
    assert torch.equal(got, match(features.float(), r, [0]))


@pytest.mark.parametrize(("similarity", "partition"), CHOICES)
def test_every_choice_matters(similarity: str, partition: str) -> None:
    if (similarity, partition) == ("cosine", "alternating"):
        return
    features, _ = drawn(8, 24, 6, 0)
    plain, _ = match_by(features, 6, [0], None, None, 0.3, "cosine", "alternating", 0)
    other, _ = match_by(features, 6, [0], None, None, 0.3, similarity, partition, 3)
    assert not torch.equal(plain, other)


def test_importance_and_its_exponent_and_the_seed_matter() -> None:
    features, own = drawn(8, 24, 6, 0)

    def maps(importance: Tensor | None, exponent: float, partition: str, seed: int) -> Tensor:
        arguments = (features, 6, [0], None, importance, exponent, "cosine", partition, seed)
        return match_by(*arguments)[0]

    found = [
        maps(None, 1.0, "alternating", 0),
        maps(own, 0.3, "alternating", 0),
        maps(own, 3.0, "alternating", 0),
        maps(None, 1.0, "random", 0),
        maps(None, 1.0, "random", 1),
    ]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))


def test_a_token_that_is_looked_at_merges_last() -> None:
    features = torch.ones(1, 1, 8, 3, dtype=torch.float64)
    features += 0.1 * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    for token in (0, 2, 4, 6):
        importance = torch.ones(1, 8, dtype=torch.float64)
        importance[0, token] = 1e6
        assign, stands = match_by(
            features, 3, [], None, importance, 1.0, "cosine", "alternating", 0
        )
        assert int(assign[0, token]) == 0
        assert int(stands[0, 0]) == token


def test_what_has_no_importance_or_is_none_does_not_break_the_order() -> None:
    features, _ = drawn(1, 12, 4, 0)
    features[:, :, 4] = float("nan")
    importance = torch.zeros(1, 12, dtype=torch.float64)
    assign, _ = match_by(features, 5, [0], None, importance, 0.3, "cosine", "alternating", 0)
    edges = reference.Edges(importance=importance)
    assert torch.equal(assign, reference.match(features, 5, (0,), edges=edges))


@pytest.mark.parametrize("queries", [[0], [0, 3], []])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("shared", [1, 2])
def test_attention_to_equals_the_reference(queries: list[int], sized: bool, shared: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 7, 5, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 4 // shared, 7, 5, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 5, (2, 7), generator=generator).float() if sized else None
    got = attention_to(query, key, size, queries, 0.4)
    expected = reference.attention_to(query, key, size, tuple(queries), 0.4)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, dtype=torch.float64))


@examples(60)
@given(st.data())
def test_combined_tokens_equal_the_reference(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 20), label="tokens")
    left = data.draw(st.integers(1, tokens), label="left")
    torch.manual_seed(data.draw(st.integers(0, 2**30), label="seed"))
    x = torch.randn(2, tokens, 6, dtype=torch.float64)
    size = torch.randint(1, 9, (2, tokens)).float()
    every, rest = torch.arange(left).expand(2, -1), torch.randint(0, left, (2, tokens - left))
    assign = torch.cat([every, rest], 1)[:, torch.randperm(tokens)]
    for got, how in (
        (merge_max(x, assign, left), "max"),
        (mlerp(x, size, assign, left, "max"), "mlerp_max"),
        (mlerp(x, size, assign, left, "mean"), "mlerp_mean"),
    ):
        expected = reference.combine(x, size, assign, left, how)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norm", ["max", "mean"])
def test_equal_tokens_and_single_ones_stay_what_they_are(norm: str) -> None:
    x = torch.randn(1, 3, 8)
    x[:, 2] = x[:, 1]
    assign, size = torch.tensor([[0, 1, 1]]), torch.tensor([[3.0, 2.0, 5.0]])
    merged = mlerp(x, size, assign, 2, norm)
    assert torch.equal(merged[:, 0], x[:, 0])
    torch.testing.assert_close(merged[:, 1], x[:, 1])
    assert torch.equal(merge_max(x, assign, 2), x[:, :2])


@pytest.mark.parametrize("norm", ["max", "mean"])
def test_gradients_flow_through_combining(norm: str) -> None:
    x = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)
    assign = torch.tensor([[0, 1, 2, 1, 2]])
    assert torch.autograd.gradcheck(lambda x: mlerp(x, None, assign, 3, norm), x)
    assert torch.autograd.gradcheck(lambda x: merge_max(x, assign, 3), x)


class Choosing(nn.Module):
    """All four in one graph."""

    def __init__(self, partition: str) -> None:
        super().__init__()
        self.partition = partition

    def forward(self, heads: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        paid = attention_to(heads, heads, None, [0], 0.5)
        assign, stands = match_by(heads, 4, [0], None, paid, 0.3, "cosine", self.partition, 1)
        merged = mlerp(x, None, assign, 8, "max") + merge_max(x, assign, 8)
        return merged, assign, stands


@pytest.mark.parametrize("partition", PARTITIONS)
def test_they_vanish_in_an_exported_program(partition: str) -> None:
    heads, x = torch.randn(2, 3, 12, 4), torch.randn(2, 12, 5)
    model = Choosing(partition)
    program = torch.export.export(model, (heads, x)).run_decompositions()
    assert not [n for n in program.graph.nodes if str(n.target).startswith("tome.")]
    for got, expected in zip(program.module()(heads, x), model(heads, x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.deep
def test_opcheck() -> None:
    heads, x = torch.randn(2, 3, 12, 4), torch.randn(2, 12, 5)
    paid = torch.rand(2, 12)
    for partition in PARTITIONS:
        torch.library.opcheck(match_by, (heads, 4, [0], None, paid, 0.3, "euclidean", partition, 2))
    assign = match(heads, 4, [0])
    torch.library.opcheck(attention_to, (heads, heads, torch.ones(2, 12), [0], 0.5))
    torch.library.opcheck(merge_max, (x, assign, 8))
    torch.library.opcheck(mlerp, (x, None, assign, 8, "mean"))


def test_a_softmax_is_that_of_attention() -> None:
    features, _ = drawn(16, 24, 6, 0)
    assign, _ = match_by(features, 6, [0], None, None, 1.0, "softmax", "alternating", 0)
    edges = reference.Edges("softmax", "alternating", 0, None, 1.0)
    assert torch.equal(assign, reference.match(features, 6, (0,), edges=edges))
