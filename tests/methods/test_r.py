"""A method says its counts as they were written, with the schedule beside them."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import numpy as np
import pytest

from tomepass import DiffRate, DynamicViT, EViT, Method, PiToMe, Threshold, ToMe
from tomepass.counts.schedule import parse_schedule
from tomepass.methods import method_from_dict

NAMES = ("r", "macs", "speedup", "keep_rate")
GIVEN: list[tuple[str, Any]] = [
    ("r", 16),
    ("r", 0),
    ("r", [8, 4]),
    ("r", []),
    ("r", (8, -1.0)),
    ("macs", 0.6),
    ("speedup", 1.5),
    ("keep_rate", 0.7),
]


@pytest.mark.parametrize(("name", "value"), GIVEN)
@pytest.mark.parametrize("kind", [ToMe, PiToMe])
def test_a_method_says_what_was_given_and_nothing_of_the_rest(
    kind: type[Method], name: str, value: Any
) -> None:
    method = kind(**{name: value})
    for seen in (
        method,
        method.replace(prop_attn=True),
        copy.deepcopy(method),
        pickle.loads(pickle.dumps(method)),
        method_from_dict(json.loads(method.to_json())),
    ):
        assert {n: getattr(seen, n) for n in NAMES} == {**dict.fromkeys(NAMES), name: value}
        assert type(seen.__dict__[name]) is type(value)
        assert (seen, hash(seen), repr(seen)) == (method, hash(method), repr(method))


def test_the_standard_counts_are_said_too() -> None:
    assert ToMe().r == 16
    assert (EViT().r, EViT().keep_rate) == (None, 0.7)  # type: ignore[comparison-overlap]
    assert ToMe(parse_schedule([3])).r == [3]
    assert type(ToMe(np.int64(8)).r) is int


@pytest.mark.parametrize(("name", "value"), GIVEN)
def test_one_may_take_the_place_of_another(name: str, value: Any) -> None:
    for first, other in GIVEN:
        method = ToMe(**{first: other}, multiple_of=4).replace(**{name: value})
        assert method == ToMe(**{name: value}, multiple_of=4)


def test_counts_that_differ_make_methods_that_differ() -> None:
    methods = [ToMe(**{name: value}) for name, value in GIVEN]  # type: ignore[arg-type]
    assert len(set(methods)) == len(methods)
    assert ToMe([13, 0]) != ToMe((13, 0))


def test_the_list_that_was_given_is_not_the_methods() -> None:
    given = [8, 4]
    method = ToMe(given)
    given.append(2)
    assert method.r == [8, 4]
    assert method == ToMe([8, 4])


@pytest.mark.parametrize("kind", [ToMe, Threshold, DiffRate, EViT, DynamicViT])
def test_the_schedule_follows_and_is_not_given(kind: type[Method]) -> None:
    assert "schedule" not in kind().to_dict()
    with pytest.raises(TypeError, match="schedule"):
        kind(schedule=kind().schedule)  # type: ignore[call-arg]
    given = [own.name for own in dataclasses.fields(kind) if own.init]
    assert "schedule" not in given
