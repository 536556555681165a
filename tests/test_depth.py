"""A covering leaves out no combination of as many values as it says."""

from __future__ import annotations

import itertools

import pytest
from depth import at_hand, covering, in_turn


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(3,), (2, 5), (4, 3, 3), (2, 2, 2, 2, 7)], ids=str)
def test_every_combination_of_values_occurs(sizes: tuple[int, ...], strength: int) -> None:
    rows = covering(sizes, strength)
    assert len(set(rows)) == len(rows)
    for axes in itertools.combinations(range(len(sizes)), min(strength, len(sizes))):
        seen = {tuple(row[axis] for axis in axes) for row in rows}
        assert seen == set(itertools.product(*(range(sizes[axis]) for axis in axes)))


def test_it_is_far_shorter_than_the_product() -> None:
    assert len(covering((4, 21), 1)) == 21
    assert len(covering((3,) * 8, 2)) < 20
    rows = covering((4, 20), 1)
    assert all(sum(row[0] == i for row in rows) == 5 for i in range(4))


def test_what_is_left_out_is_deep() -> None:
    deep = [bool(value.marks) for value in in_turn("ab", "xyz")]
    assert (len(deep), sum(deep)) == (6, 3)
    assert [bool(value.marks) for value in at_hand("abc", "b")] == [True, False, True]
    with pytest.raises(AssertionError, match="'d'"):
        at_hand("abc", "d")
