"""Operators of pruning, against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tomepass.ops.dropping.prune import (
    counted,
    fuse_rest,
    gather_size,
    let_go,
    nearest,
    places,
    random_score,
    select,
    weights_of,
)

NAN = float("nan")


@settings(deadline=None)
@given(st.data())
def test_select_is_a_stable_sort(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 20))
    protected = sorted(data.draw(st.sets(st.integers(0, tokens - 1), max_size=3)))
    left = data.draw(st.integers(len(protected), tokens))
    score = torch.tensor([data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]),
                                             min_size=tokens, max_size=tokens))])  # fmt: skip
    free = [i for i in range(tokens) if i not in protected]
    best = sorted(free, key=lambda i: (-float(score[0, i]), i))[: left - len(protected)]
    assert select(score, left, protected).tolist() == [[*protected, *sorted(best)]]


def test_what_is_no_number_and_what_is_padding_goes_first() -> None:
    score = torch.tensor([[0.1, NAN, 0.3, 9.0, 0.2]])
    assert select(score, 3, []).tolist() == [[2, 3, 4]]
    assert select(score, 4, []).tolist() == [[0, 2, 3, 4]]
    size = torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0]])
    assert select(score, 3, [], size).tolist() == [[0, 2, 4]]
    with pytest.raises(ValueError, match="6 of 5 tokens"):
        select(score, 6, [])
    with pytest.raises(ValueError, match="1 of 5 tokens, 2 of them protected"):
        select(score, 1, [0, 1])


def test_places_turn_positions_around() -> None:
    assert places(torch.tensor([[0, 3, 4]]), 6).tolist() == [[0, -1, -1, 1, 2, -1]]


def test_the_nearest_unprotected_token_in_use_stands_in() -> None:
    x = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.8, 0.2], [0.1, 1]])[None, None]
    stands = torch.tensor([[0, 2, 3]])
    assert nearest(x, stands, [0]).tolist() == [[0, 2, 1, 2, 1]]
    assert nearest(x, stands, []).tolist() == [[0, 0, 1, 2, 1]]
    size = torch.tensor([[1.0, 1.0, 0.0]])
    # What is out of use is found at another one itself.
    assert nearest(x, stands, [0], size).tolist() == [[0, 1, 1, 1, 1]]


def test_the_rest_is_fused_at_the_end_and_the_highest_stands_for_it() -> None:
    assign, stands = fuse_rest(torch.tensor([[9.0, 1, 3, 2, NAN]]), torch.tensor([[0, 3]]))
    assert assign.tolist() == [[0, 2, 2, 1, 2]]
    assert stands.tolist() == [[0, 3, 2]]


def test_sizes_weights_and_what_is_let_go() -> None:
    stands = torch.tensor([[0, 2]])
    assert gather_size(None, stands).tolist() == [[1.0, 1.0]]
    assert gather_size(torch.tensor([[1.0, 2, 3]]), stands).tolist() == [[1.0, 3.0]]
    weight = weights_of(torch.tensor([[0.5, NAN, 0.2]]), torch.tensor([[1.0, 1.0, 0.0]]))
    assert weight[0, 0] == 0.5
    assert 0 < weight[0, 1] < 1e-10
    assert weight[0, 2] == 0
    dropped = torch.tensor([[1, 2]])
    assert let_go(torch.tensor([[0, 1, 0, 2]]), dropped).tolist() == [[0, -1, -1, 2]]
    assert counted(None, dropped, 4).tolist() == [[1.0, 0.0, 0.0, 1.0]]
    size = torch.tensor([[2.0, 3, 4, 5]])
    assert counted(size, dropped, 4).tolist() == [[2.0, 0.0, 0.0, 5.0]]


def test_a_shuffle_is_one_whatever_the_image() -> None:
    like = torch.zeros(3, 30, 2)
    score = random_score(like, 30, 4)
    assert score.shape == (3, 30)
    assert len(set(score[0].tolist())) == 30
    assert torch.equal(score[0], score[2])
    assert not torch.equal(score, random_score(like, 30, 5))
