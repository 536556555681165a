"""Schedules: from r to counts per block, and the cap on each."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tomepass import reference
from tomepass.counts.schedule import Schedule, capped, counts_per_block, parse_schedule


def counts(r: Any, blocks: int) -> tuple[int, ...]:
    return counts_per_block(parse_schedule(r), blocks)


rates = st.one_of(
    st.integers(0, 60),
    st.lists(st.integers(0, 60), max_size=24),
    st.tuples(st.integers(0, 60), st.floats(-1, 1)),
)


@pytest.mark.parametrize(
    ("r", "blocks", "expected"),
    [
        (8, 4, (8, 8, 8, 8)),
        (0, 2, (0, 0)),
        (8, 0, ()),
        ([5, 3], 4, (5, 3, 0, 0)),
        ([5, 3], 2, (5, 3)),
        ([], 3, (0, 0, 0)),
        ((13, 0), 3, (13, 13, 13)),
        ((8, -1), 5, (16, 12, 8, 4, 0)),
        ((8, 1), 5, (0, 4, 8, 12, 16)),
        ((8, -1), 4, (16, 10, 5, 0)),  # 10.67 and 5.33, truncated
        ((8, 1), 4, (0, 5, 10, 16)),
        ((7, -0.5), 4, (10, 8, 6, 4)),  # lo = int(10.5), hi = 14 - lo; 8, 6
        ((8, -1), 1, (8,)),
        ((8, 1), 2, (0, 16)),
    ],
)
def test_counts_of_each_form_of_r(r: Any, blocks: int, expected: tuple[int, ...]) -> None:
    assert counts(r, blocks) == expected


@settings(deadline=None)
@given(rates, st.integers(1, 48))
def test_counts_agree_with_the_reference(r: Any, blocks: int) -> None:
    if isinstance(r, list) and len(r) > blocks:
        r = r[:blocks]
    assert counts(r, blocks) == tuple(reference.schedule(r, blocks))


@settings(deadline=None)
@given(st.integers(0, 10**18), st.floats(-1, 1), st.integers(2, 40))
def test_linear_counts_stay_between_their_ends(r: int, inflection: float, blocks: int) -> None:
    linear = counts((r, inflection), blocks)
    assert linear[0] == int(r * (1 - inflection))
    assert linear[-1] == 2 * r - linear[0]
    assert list(linear) in (sorted(linear), sorted(linear, reverse=True))


@pytest.mark.parametrize("blocks", [0, 1, 11])
def test_a_list_longer_than_the_blocks_is_an_error_that_says_both(blocks: int) -> None:
    with pytest.raises(ValueError, match=rf"r lists 12 counts but the model has {blocks} blocks"):
        counts([1] * 12, blocks)


@pytest.mark.parametrize(
    ("r", "error", "message"),
    [
        (-1, ValueError, "expected 0 or more, got -1"),
        ([4, -2], ValueError, "expected 0 or more, got -2"),
        ((-8, 0.0), ValueError, "expected 0 or more, got -8"),
        (8.0, TypeError, r"expected an int, got 8\.0"),
        (True, TypeError, "expected an int, got True"),
        (False, TypeError, "expected an int, got False"),
        ("8", TypeError, "expected an int, got '8'"),
        (None, TypeError, "expected an int, got None"),
        ({8}, TypeError, r"expected an int, got \{8\}"),
        ([4, 2.5], TypeError, r"expected an int, got 2\.5"),
        ([4, True], TypeError, "expected an int, got True"),
        ([[4]], TypeError, r"expected an int, got \[4\]"),
        ((8.0, 0.0), TypeError, r"expected an int, got 8\.0"),
        ((True, 0.0), TypeError, "expected an int, got True"),
        ((1, 2, 3), ValueError, r"pair \(r, inflection\), got 3 values.*write a list"),
        ((8,), ValueError, r"pair \(r, inflection\), got 1 values"),
        ((), ValueError, r"pair \(r, inflection\), got 0 values"),
        ((8, 1.5), ValueError, r"inflection: expected a number in \[-1, 1\], got 1\.5"),
        ((8, -2), ValueError, r"inflection: expected a number in \[-1, 1\], got -2"),
        ((8, float("nan")), ValueError, r"inflection: .*got nan"),
        ((8, True), TypeError, "inflection: expected a number .* got True"),
        ((8, "1"), TypeError, "inflection: expected a number .* got '1'"),
        ((8, None), TypeError, "inflection: expected a number .* got None"),
        (np.float64(8), TypeError, "expected an int"),
        (np.bool_(True), TypeError, "expected an int"),
        (torch.tensor(True), TypeError, "expected an int"),
        (np.array([4, 2]), TypeError, "expected an int"),
    ],
)
def test_a_wrong_r_is_refused_with_what_was_expected_and_what_came(
    r: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        parse_schedule(r)


def test_numpy_numbers_become_pythons_own() -> None:
    assert parse_schedule(np.int64(8)) == parse_schedule(8)
    assert parse_schedule([np.int32(8), 4]) == parse_schedule([8, 4])
    assert parse_schedule((np.uint8(8), np.float32(-0.5))) == parse_schedule((8, -0.5))
    values = parse_schedule((np.uint8(8), np.float32(-0.5))).values
    assert [type(v) for v in values] == [int, float]


def test_a_list_and_a_pair_of_the_same_numbers_differ() -> None:
    assert parse_schedule([13, 0]) != parse_schedule((13, 0))
    assert counts([13, 0], 4) == (13, 0, 0, 0)
    assert counts((13, 0), 4) == (13, 13, 13, 13)
    assert parse_schedule([8]) != parse_schedule(8)


@settings(deadline=None)
@given(rates)
def test_a_schedule_survives_json_and_parsing_again(r: Any) -> None:
    schedule = parse_schedule(r)
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert parse_schedule(schedule) == schedule
    assert hash(parse_schedule(schedule)) == hash(schedule)


@pytest.mark.parametrize("data", [{"r": 8}, {"r": 8, "inflexion": 0.0}, {}])
def test_json_without_its_fields_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="inflection"):
        Schedule.from_json(data)


@pytest.mark.parametrize(
    ("r", "shown"), [(8, "r=8"), ([8, 4], "r=[8, 4]"), ((8, -1), "r=(8, -1.0)"), ([], "r=[]")]
)
def test_a_schedule_is_shown_as_one_writes_it(r: Any, shown: str) -> None:
    assert repr(parse_schedule(r)) == shown


@settings(deadline=None)
@given(st.data())
def test_the_cap_agrees_with_the_reference(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(0, 40), label="tokens")
    positions = st.lists(st.integers(0, max(tokens - 1, 0)), max_size=tokens, unique=True)
    protected = tuple(data.draw(positions, label="protected"))
    r = data.draw(st.integers(0, 50), label="r")
    assert capped(r, tokens, protected) == reference.merge_count(r, tokens, protected)


@pytest.mark.parametrize(
    ("tokens", "protected", "most"),
    [
        (197, (0,), 98),
        (196, (), 98),
        (6, (0, 1, 2), 1),  # 3 left: 4 is the one source
        (6, (1, 3, 5), 0),  # no destination
        (6, (0, 2, 4), 0),  # no source
        (7, (0, 2, 4), 1),  # one source, two destinations to spare
        (5, (0, 1, 2, 3, 4), 0),
        (2, (), 1),
        (1, (), 0),
        (0, (), 0),
    ],
)
def test_at_most_half_of_the_free_tokens_merge_and_only_into_free_ones(
    tokens: int, protected: tuple[int, ...], most: int
) -> None:
    assert capped(1000, tokens, protected) == most
    assert capped(0, tokens, protected) == 0


def test_published_token_counts_of_vit_large_at_384_pixels() -> None:
    # ToMe paper: 577 tokens, r=25, where the cap ends the schedule.
    tokens = list(
        itertools.accumulate(counts(25, 24), lambda n, r: n - capped(r, n, (0,)), initial=577)
    )
    assert {block: tokens[block] for block in (8, 16, 22, 23, 24)} == {
        8: 377,
        16: 177,
        22: 27,
        23: 14,
        24: 8,
    }
