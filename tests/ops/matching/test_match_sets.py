"""Matching between sets that the data choose, greedy pairs, clusters, energy and order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tomepass.ops.dropping.prune import order_by
from tomepass.ops.matching.match_greedy import match_greedy
from tomepass.ops.matching.match_kmeans import match_kmeans
from tomepass.ops.matching.match_sets import energy, match_sets
from tomepass.ops.sequence import in_sequence

NAN = float("nan")


def on_a_circle(*degrees: float) -> torch.Tensor:
    """Features ``[1, 1, N, 2]`` at some angles: the nearer, the more alike."""
    angle = torch.tensor(degrees) * torch.pi / 180
    return torch.stack([angle.cos(), angle.sin()], -1)[None, None]


@settings(deadline=None)
@given(st.data())
def test_order_is_a_stable_sort_of_the_unprotected(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 20))
    protected = sorted(data.draw(st.sets(st.integers(0, tokens - 1), max_size=3)))
    values = st.sampled_from([0.0, 0.5, 1.0])
    score = data.draw(st.lists(values, min_size=tokens, max_size=tokens))
    free = [i for i in range(tokens) if i not in protected]
    expected = sorted(free, key=lambda i: (-score[i], i))
    assert order_by(torch.tensor([score]), protected).tolist() == [expected]


def test_order_puts_what_is_no_number_and_padding_last() -> None:
    score = torch.tensor([[NAN, 1.0, 2.0, 3.0]])
    assert order_by(score, []).tolist() == [[3, 2, 1, 0]]
    size = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert order_by(score, [], size).tolist()[0][:2] == [2, 1]


def test_each_image_has_its_own_sets() -> None:
    x = on_a_circle(0, 10, 50, 60, 200).expand(2, 1, -1, -1)
    sources, destinations = torch.tensor([[1, 3], [0, 2]]), torch.tensor([[2, 0], [3, 1]])
    both, kept = match_sets(x, sources, destinations, 2, [4], None, "cosine")
    assert both.tolist() == [[1, 1, 2, 2, 0], [1, 1, 2, 2, 0]]
    assert kept.tolist() == [[4, 0, 2], [4, 1, 3]]


def test_padding_merges_with_padding() -> None:
    x = on_a_circle(0, 1, 90, 180)
    size = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    _, stands = match_sets(x, torch.tensor([[0, 1]]), torch.tensor([[2, 3]]), 2, [], size, "cosine")
    assert stands.tolist() == [[2, 3]]
    assign, _ = match_sets(x, torch.tensor([[0, 1]]), torch.tensor([[2, 3]]), 2, [], size, "cosine")
    assert (assign.tolist(), stands.tolist()) == ([[0, 1, 0, 1]], [[2, 3]])


def test_sets_too_small_are_refused() -> None:
    x = on_a_circle(0, 10, 20)
    with pytest.raises(ValueError, match="1 sources and 1 destinations cannot merge r=2"):
        match_sets(x, torch.tensor([[0]]), torch.tensor([[1]]), 2, [], None, "cosine")


def test_greedy_takes_the_nearest_pair_then_the_nearest_of_the_rest() -> None:
    x = on_a_circle(0, 12, 10, 40, 45, 180)
    assign, stands = match_greedy(x, 2, [], None, "cosine")
    # 12 and 10 are two degrees apart, 40 and 45 five; 0 would have been nearest to 10.
    assert stands.tolist() == [[0, 1, 3, 5]]
    assert assign.tolist() == [[0, 1, 1, 2, 2, 3]]
    assert match_greedy(x, 1, [1], None, "euclidean")[1].tolist() == [[1, 0, 2, 3, 5]]
    with pytest.raises(ValueError, match="tokens can merge"):
        match_greedy(x, 4, [], None, "cosine")


def test_greedy_keeps_padding_apart_and_takes_what_is_no_number_last() -> None:
    x = on_a_circle(0, 1, 90, 180)
    size = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    assert match_greedy(x, 1, [], size, "cosine")[1].tolist() == [[0, 1, 2]]  # padding first
    x[0, 0, 1] = NAN
    assert match_greedy(x, 1, [], None, "cosine")[1].tolist() == [[0, 1, 3]]


def test_clusters_gather_around_their_seeds() -> None:
    x = on_a_circle(0, 5, 90, 95, 100, 200)
    assign, stands = match_kmeans(x, 3, [5], None, "cosine", 2)
    # Two clusters of five free tokens start at the first and the third of them.
    assert stands.tolist() == [[5, 0, 2]]
    assert assign.tolist() == [[1, 1, 2, 2, 2, 0]]
    assert match_kmeans(x, 0, [5], None, "cosine", 2)[1].tolist() == [[5, 0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match="5 free tokens can lose 4"):
        match_kmeans(x, 5, [5], None, "cosine", 1)


def test_centres_move_with_their_tokens() -> None:
    x = on_a_circle(0, 33, 50, 60, 80, 130)
    first = match_kmeans(x, 4, [], None, "cosine", 1)[0]
    later = match_kmeans(x, 4, [], None, "cosine", 3)[0]
    # Seeds at 0 and 60: 33 is nearer to 60; the second centre moves up, and lets go of it.
    assert first.tolist() == [[0, 1, 1, 1, 1, 1]]
    assert later.tolist() == [[0, 0, 1, 1, 1, 1]]


def test_energy_is_the_mean_elu_of_cosines_above_a_margin() -> None:
    x = on_a_circle(0, 0, 90, 45)
    found = energy(x, 0.5, [3])
    alike, apart = 0.5, torch.tensor(-0.5).exp().item() - 1
    expected = [(alike + apart) / 2, (alike + apart) / 2, apart]
    assert found[0, :3].tolist() == pytest.approx(expected, abs=1e-6)
    size = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    assert energy(x, 0.5, [3], size)[0, 0] == pytest.approx(alike)


def test_a_sequence_keeps_protected_tokens_first_and_the_rest_by_position() -> None:
    into = torch.tensor([[0, 4, 2, 0, 4]])
    assign, stands = in_sequence(into, 3, [2])
    assert stands.tolist() == [[2, 0, 4]]
    assert assign.tolist() == [[1, 2, 0, 1, 2]]


def test_greedy_pairs_share_no_token() -> None:
    x = on_a_circle(0, 2, 5, 90, 100)
    # 5 is nearer to 0 and 2 than 90 to 100, but they are a pair already.
    assert match_greedy(x, 2, [], None, "cosine")[0].tolist() == [[0, 0, 1, 2, 2]]
