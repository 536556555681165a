"""Where the counts of a schedule go, and how they are fitted to a share of the MACs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tomepass import EViT, Method, Prune, ToMe, TomeError
from tomepass.calibration.shapes import Shape, filled, fitted
from tomepass.planning.solving import even

TOKENS, HELD, DEPTH = 65, 1, 6


def share(method: Method) -> float:
    """Half of the cost is linear in the tokens left after each block, half is in its square."""
    plan = method.plan(TOKENS, tuple(range(HELD)), DEPTH)
    left = [block.tokens_out / TOKENS for block in plan.blocks]
    return sum(0.5 * n + 0.5 * n * n for n in left) / DEPTH


shapes = st.builds(
    Shape,
    start=st.integers(0, DEPTH - 2),
    ramp=st.booleans(),
    power=st.sampled_from([0.0, 0.25, 1.0, 2.0]),
    last=st.sampled_from(["same", "none", "most"]),
)


@settings(deadline=None)
@given(shapes, st.floats(0.35, 1.0), st.sampled_from([ToMe(), Prune()]))
def test_a_fitted_shape_keeps_its_goal_and_wastes_less_than_a_token(
    shape: Shape, macs: float, method: Method
) -> None:
    found = fitted(shape, method, macs, share, TOKENS, HELD, DEPTH)
    if found is None:
        everything = method.replace(r=shape.counts(1.0, method, TOKENS, HELD, DEPTH))
        assert share(everything) > macs
        return
    assert share(found) <= macs
    counts = list(found.schedule.values)
    assert counts[: shape.start] == [0] * shape.start
    if shape.last == "none":
        assert counts[-1] == 0
    for index, count in enumerate(counts):
        if count:
            fewer = [*counts[:index], count - 1, *counts[index + 1 :]]
            assert share(found.replace(r=fewer)) > macs


def test_a_rate_has_no_counts_to_give_back() -> None:
    """It came back as r=0: nothing reduced."""
    method = EViT(keep_rate=0.7)
    assert filled(method, 0.9, share) == method


def test_powers_spread_evenly_or_by_what_is_left() -> None:
    assert Shape(power=0.0).counts(0.1, ToMe(), 65, 1, 4) == [6, 6, 6, 6]
    assert Shape(power=1.0).counts(0.25, ToMe(), 65, 1, 4) == [16, 12, 9, 7]
    assert Shape(start=1, last="none").counts(0.1, ToMe(), 65, 1, 4) == [0, 6, 6, 0]
    assert Shape(start=1, ramp=True).counts(0.2, ToMe(), 65, 1, 4) == [0, 6, 13, 13]
    assert Shape(last="most").counts(0.1, ToMe(), 65, 1, 4) == [6, 6, 6, 23]


def test_neighbours_are_one_step_away_and_stay_inside() -> None:
    found = Shape().neighbours(4)
    assert Shape(1) in found
    assert Shape(power=0.25) in found
    assert Shape(last="most") in found
    assert all(s.start >= 0 and s.power >= 0 for s in found)
    assert {s.start for s in Shape(2).neighbours(4)} == {1, 2}


@pytest.mark.parametrize("method", [ToMe(), EViT(), Prune()])
def test_a_method_s_own_spread_reaches_the_goal_by_its_smallest_step(method: Method) -> None:
    found = even(method, 0.7, share, TOKENS, DEPTH)
    assert 0.66 < share(found) <= 0.7
    assert found.schedule.kind == ("keep_rate" if isinstance(method, EViT) else "list")


def test_what_cannot_be_reached_is_said() -> None:
    with pytest.raises(TomeError, match=r"(?s)macs=0.01 .* ToMe .* ask for macs=0\.\d+ or more"):
        even(ToMe(), 0.01, share, TOKENS, DEPTH)
