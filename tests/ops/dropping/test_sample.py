"""tome::significance and sample, tome::halting and halt: against loops written from the papers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from torch import Tensor, nn

from tomepass.ops.attending.attention_to import attention_to, received
from tomepass.ops.dropping.halt import halt, halting
from tomepass.ops.dropping.prune import nearest, places, select
from tomepass.ops.dropping.sample import sample, significance
from tomepass.ops.padding import PADDED


def scores(images: int, tokens: int, seed: int = 0) -> Tensor:
    """Shares of attention, a few of them large, in float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(images, tokens, generator=generator, dtype=torch.float64)
    return (2 * drawn).softmax(-1)


def plain_samples(score: list[float], count: int, usable: list[int]) -> list[int]:
    """The position at which the distribution function reaches each quantile."""
    total, found = math.fsum(score[i] for i in usable), []
    for k in range(1, count + 1):
        reached = [math.fsum(score[j] for j in usable if j <= i) / total for i in usable]
        found.append(
            next(i for i, r in zip(usable, reached, strict=True) if r >= (2 * k - 1) / (2 * count))
        )
    return found


@examples(50)
@given(st.data())
def test_samples_are_the_paper_s(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(2, 30), label="tokens")
    every = st.sets(st.integers(0, tokens - 1), max_size=min(4, tokens - 1))
    protected = sorted(data.draw(every, label="protected"))
    left = data.draw(st.integers(len(protected) + 1, tokens), label="left")
    score = scores(2, tokens, data.draw(st.integers(0, 2**30), label="seed"))
    size = None
    if data.draw(st.booleans(), label="holes"):
        size = torch.where(score > score.median(), 0.0, 1.0).float()
        if any(not any(row[i] for i in range(tokens) if i not in protected) for row in size):
            return
    stands, used = sample(score, left, protected, size)
    for image in range(2):
        free = [i for i in range(tokens) if i not in protected]
        usable = [i for i in free if size is None or size[image, i] > 0]
        found = plain_samples(score[image].tolist(), left - len(protected), usable)
        assert stands[image].tolist() == [*protected, *found]
        first = [float(place not in found[:k]) for k, place in enumerate(found)]
        assert used[image].tolist() == [1.0] * len(protected) + first


def test_one_token_that_has_it_all_is_kept_once() -> None:
    score = torch.zeros(1, 10)
    score[0, 6] = 0.3
    stands, used = sample(score, 6, [0])
    assert stands.tolist() == [[0, 6, 6, 6, 6, 6]]
    assert used.tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]


def test_scores_that_are_alike_are_sampled_evenly() -> None:
    stands, used = sample(torch.full((1, 8), 0.5), 4, [])
    assert stands.tolist() == [[0, 2, 4, 6]]
    assert used.tolist() == [[1.0] * 4]


def test_what_is_no_number_or_nothing_scores_nothing() -> None:
    score = torch.full((2, 6), float("nan"))
    score[0, 2] = score[0, 4] = 1.0
    score[1] = 0.0
    stands, used = sample(score, 4, [0])
    assert stands[0].tolist() == [0, 2, 2, 4]
    assert used[0].tolist() == [1.0, 1.0, 0.0, 1.0]
    assert stands[1].tolist() == [0, 1, 3, 5]  # all alike
    size = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0, 0.0]])
    stands, used = sample(torch.zeros(1, 6), 4, [0], size)
    assert stands.tolist() == [[0, 1, 1, 3]]


@pytest.mark.parametrize("left", [1, 0, 8])
def test_counts_that_cannot_be_are_refused(left: int) -> None:
    with pytest.raises(ValueError, match=f"{left} of 7 tokens, 1 of them protected"):
        sample(torch.rand(2, 7), left, [0])


def test_significance_is_attention_times_the_length_of_the_value() -> None:
    attention, values = torch.rand(2, 5), torch.randn(2, 3, 5, 4)
    expected = [
        [float(a) * float(values[i, :, j].norm()) for j, a in enumerate(row)]
        for i, row in enumerate(attention)
    ]
    torch.testing.assert_close(significance(attention, values), torch.tensor(expected))


# ---- halting ---------------------------------------------------------------------------------


def test_scores_add_up_while_a_token_is_in_use() -> None:
    hidden = torch.randn(2, 4, 3)
    size = torch.tensor([[1.0, 0.0, 2.0, PADDED / 10], [1.0, 1.0, 1.0, 0.0]])
    before = torch.rand(2, 4)
    got = halting(hidden, before, size, 5.0, -1.0)
    for image in range(2):
        for token in range(4):
            h = 1 / (1 + math.exp(-(5 * float(hidden[image, token, 0]) - 1)))
            expected = float(before[image, token]) + (h if size[image, token] >= 1 else 0.0)
            assert float(got[image, token]) == pytest.approx(expected, rel=1e-5)
    alone = halting(hidden, None, None, 5.0, -1.0)
    torch.testing.assert_close(alone, torch.sigmoid(5 * hidden[..., 0] - 1))


def test_a_token_halts_when_its_sum_reaches_the_limit() -> None:
    total = torch.tensor([[9.0, 0.98, 0.99, 1.5, 0.2, 0.1]])
    size, score = halt(total, None, [0], 0.99)
    assert size.tolist() == [[1.0, 1.0, 0.0, 0.0, 1.0, 1.0]]
    assert torch.equal(score, -total)
    again, _ = halt(total + 0.05, size, [0], 0.99)
    assert again.tolist() == [[1.0, 0.0, 0.0, 0.0, 1.0, 1.0]]


def test_of_tokens_that_all_halt_the_lowest_stays() -> None:
    total = torch.tensor([[0.0, 3.0, 2.0, 2.0], [5.0, 1.0, 4.0, 5.0]])
    size = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]])
    assert halt(total, size, [0], 1.0)[0].tolist() == [[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]]
    assert halt(total, None, [], 0.0)[0].tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]


# ---- places out of use -----------------------------------------------------------------------


def test_a_token_is_found_where_it_is_in_use_and_else_at_the_most_similar() -> None:
    stands, size = torch.tensor([[0, 2, 2, 4]]), torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    assert places(stands, 6).tolist() == [[0, -1, 2, -1, 3, -1]]
    assert places(stands, 6, size).tolist() == [[0, -1, 1, -1, 3, -1]]
    features = torch.eye(6)[None, None].clone()
    features[0, 0, 1, 4] = features[0, 0, 3, 2] = features[0, 0, 5, 0] = 9.0
    assert nearest(features, stands, [0], size).tolist() == [[0, 3, 1, 1, 3, 1]]
    # Of size 0 a token that is kept is found elsewhere; padding, with next to none, is not.
    stands = torch.tensor([[0, 3, 4]])
    for nothing, expected in ((0.0, 2), (PADDED / 10, 1)):
        size = torch.tensor([[1.0, nothing, 1.0]])
        assert int(nearest(features, stands, [0], size)[0, 3]) == expected


def test_what_is_out_of_use_goes_first() -> None:
    size = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]])
    score = torch.tensor([[0.0, 9.0, 1.0, 3.0, 8.0]])
    assert select(score, 3, [0], size).tolist() == [[0, 2, 3]]
    assert select(score, 4, [0], size).tolist() == [[0, 1, 2, 3]]


def test_what_is_out_of_use_pays_nothing() -> None:
    query = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    size = torch.tensor([[1.0, 2.0, 0.0, 1.0, 0.0, 1.0], [1.0, PADDED / 9, 3.0, 1.0, 1.0, 1.0]])
    used = size >= PADDED
    paid = attention_to(query, query, size, [], 0.5)
    for image in range(2):
        own = query[image : image + 1, :, used[image]]
        alone = attention_to(own, own, size[image : image + 1, used[image]], [], 0.5)
        torch.testing.assert_close(paid[image, used[image]], alone[0])
    assert float(paid[~used].abs().max()) == 0.0
    weights = torch.rand(2, 6, 6)
    torch.testing.assert_close(received(weights, size)[0], weights[0, used[0]].mean(0))


# ---- doors -----------------------------------------------------------------------------------


class Adaptive(nn.Module):
    """All of them in one graph."""

    def forward(self, heads: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        score = significance(attention_to(heads, heads, None, [], 0.5), heads)
        stands, used = sample(score, 8, [0, 5])
        total = halting(x, halting(x, None, None, 1.0, 0.0), None, 2.0, -1.0)
        return (stands, used, places(stands, 12, used), *halt(total, None, [0], 0.9))


def test_they_vanish_in_an_exported_program() -> None:
    heads, x = torch.randn(2, 3, 12, 4), torch.randn(2, 12, 5)
    program = torch.export.export(Adaptive(), (heads, x)).run_decompositions()
    assert not [n for n in program.graph.nodes if str(n.target).startswith("tome.")]
    for got, expected in zip(program.module()(heads, x), Adaptive()(heads, x), strict=True):
        torch.testing.assert_close(got, expected)


# tests/methods/test_generated_code.py has code generated of them.
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.deep)]
)
def test_they_compile(compiler: str) -> None:
    heads, x = torch.randn(2, 3, 12, 4), torch.randn(2, 12, 5)
    compiled = torch.compile(Adaptive(), fullgraph=True, backend=compiler)(heads, x)
    for got, expected in zip(compiled, Adaptive()(heads, x), strict=True):
        torch.testing.assert_close(got, expected)


def test_opcheck() -> None:
    score, x, size = torch.rand(2, 12), torch.randn(2, 12, 5), torch.ones(2, 12)
    torch.library.opcheck(significance, (score, torch.randn(2, 3, 12, 4)))
    torch.library.opcheck(sample, (score, 8, [0]))
    torch.library.opcheck(sample, (score, 8, [0], size))
    torch.library.opcheck(halting, (x, None, None, 5.0, -10.0))
    torch.library.opcheck(halting, (x, score, size, 5.0, -10.0))
    torch.library.opcheck(halt, (score, None, [0], 0.99))
    torch.library.opcheck(halt, (score, size, [0], 0.99))
    torch.library.opcheck(received, (torch.rand(2, 12, 12), size))
