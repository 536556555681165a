"""Fixed positions as slices and ranges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tomepass.ops.positions import constant, runs, take

ascending = st.sets(st.integers(0, 40)).map(sorted)


@settings(deadline=None)
@given(ascending)
def test_runs_hold_every_position_once_and_in_order(positions: list[int]) -> None:
    assert [p for run in runs(positions) for p in run] == positions


@settings(deadline=None)
@given(ascending)
def test_take_reads_what_indexing_reads(positions: list[int]) -> None:
    x = torch.arange(2 * 41 * 3).view(2, 41, 3)
    assert torch.equal(take(x, positions), x[:, torch.tensor(positions, dtype=torch.long)])


@settings(deadline=None)
@given(ascending)
def test_a_constant_is_the_same_for_each_image(values: list[int]) -> None:
    if values:
        assert constant(values, 3, torch.device("cpu")).tolist() == [values] * 3


@pytest.mark.parametrize(
    ("positions", "count"),
    [
        ([], 0),
        ([7], 1),
        (list(range(2, 197, 2)), 1),  # the sources behind a class token
        (list(range(0, 197)), 1),
        ([p for p in range(0, 40, 2) if p != 20], 2),
        ([0, 1, 5, 6, 7], 2),
    ],
)
def test_even_spacing_takes_few_runs(positions: list[int], count: int) -> None:
    assert len(runs(positions)) == count
