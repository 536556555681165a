"""ToMe: a frozen value that says what to do."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tomepass import ToMe, TomeError
from tomepass.methods import method_from_dict
from tomepass.methods.asked import resolve_method

rates = st.one_of(
    st.integers(0, 60),
    st.lists(st.integers(0, 60), max_size=24),
    st.tuples(st.integers(0, 60), st.floats(-1, 1)),
)
targets = st.one_of(
    rates.map(lambda r: {"r": r}),
    st.floats(0.01, 1).map(lambda share: {"macs": share}),
    st.floats(1, 9).map(lambda speedup: {"speedup": speedup}),
)
methods = st.builds(
    lambda target, **fields: ToMe(**target, **fields),
    targets,
    multiple_of=st.integers(1, 32),
    prop_attn=st.booleans(),
    protected=st.one_of(st.none(), st.lists(st.integers(0, 300), max_size=5)),
    trace_source=st.booleans(),
)


def test_the_defaults_are_those_of_the_paper() -> None:
    method = ToMe()
    assert method == ToMe(16, prop_attn=True, protected=None, trace_source=False)
    assert method.counts(12) == (16,) * 12
    assert (method.prop_attn, method.protected, method.trace_source) == (True, None, False)


@pytest.mark.parametrize(
    "field", ["r", "macs", "prop_attn", "protected", "trace_source", "multiple_of", "new"]
)
def test_it_is_frozen(field: str) -> None:
    method = ToMe(8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(method, field, 1)
    assert method == ToMe(8)


def test_everything_but_r_is_given_by_name() -> None:
    with pytest.raises(TypeError):
        ToMe(8, False)  # type: ignore[misc]


@settings(deadline=None)
@given(methods, methods)
def test_equality_and_hash_follow_the_fields(a: ToMe, b: ToMe) -> None:
    names = [f.name for f in dataclasses.fields(ToMe)]
    equal = all(getattr(a, n) == getattr(b, n) for n in names)
    assert (a == b) is equal
    assert len({a, b}) == (1 if equal else 2)


@pytest.mark.parametrize(
    "changed",
    [
        ToMe(9),
        ToMe([8]),
        ToMe((8, 0)),
        ToMe(8, prop_attn=False),
        ToMe(8, protected=()),
        ToMe(8, protected=(0,)),
        ToMe(8, trace_source=True),
        ToMe(8, multiple_of=8),
        ToMe(macs=0.8),
        ToMe(speedup=1.25),
    ],
)
def test_every_field_tells_two_methods_apart(changed: ToMe) -> None:
    assert changed != ToMe(8)
    assert ToMe.from_json(changed.to_json()) != ToMe(8)
    assert repr(changed) != repr(ToMe(8))


def test_a_list_given_is_not_held_on_to() -> None:
    r, protected = [8, 4], [0, 1]
    method = ToMe(r, protected=protected)
    r[0], protected[0] = 99, 99
    assert method == ToMe([8, 4], protected=(0, 1))
    assert hash(method) == hash(ToMe([8, 4], protected=(0, 1)))


def test_a_list_and_a_pair_stay_different_wherever_they_travel() -> None:
    counts, pair = ToMe([13, 0]), ToMe((13, 0))
    for travel in (
        lambda m: m,
        lambda m: ToMe.from_json(m.to_json()),
        lambda m: method_from_dict(json.loads(json.dumps(m.to_dict()))),
        lambda m: pickle.loads(pickle.dumps(m)),
        copy.copy,
        copy.deepcopy,
        lambda m: dataclasses.replace(m, prop_attn=True),
        lambda m: m.replace(prop_attn=True),
        lambda m: ToMe(m.r),
    ):
        assert travel(counts).counts(3) == (13, 0, 0)
        assert travel(pair).counts(3) == (13, 13, 13)
        assert travel(counts) == counts
        assert travel(pair) == pair
    assert counts != pair
    assert counts.to_json() != pair.to_json()


@settings(deadline=None)
@given(methods)
def test_json_pickle_and_repr_give_the_same_method_back(method: ToMe) -> None:
    assert ToMe.from_json(method.to_json()) == method
    assert pickle.loads(pickle.dumps(method)) == method
    assert eval(repr(method), {"ToMe": ToMe}) == method
    assert "\n" not in method.to_json()


@settings(deadline=None)
@given(methods)
def test_replace_changes_one_field_and_keeps_the_rest(method: ToMe) -> None:
    changed = method.replace(trace_source=not method.trace_source)
    assert changed.trace_source is not method.trace_source
    assert changed.replace(trace_source=method.trace_source) == method
    assert dataclasses.replace(method, trace_source=changed.trace_source) == changed


def test_replace_checks_what_it_is_given() -> None:
    with pytest.raises(ValueError, match="got -1"):
        ToMe(8).replace(r=-1)
    with pytest.raises(TypeError):
        ToMe(8).replace(rate=4)


# r itself is checked in test_schedule.py, where all its wrong forms are.
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"r": -1}, ValueError, "expected 0 or more, got -1"),
        ({"r": 8.0}, TypeError, r"expected an int, got 8\.0"),
        ({"r": True}, TypeError, "expected an int, got True"),
        (
            {"r": 8, "macs": 0.6},
            TypeError,
            "give one of r, macs, speedup and keep_rate, got r and macs",
        ),
        ({"macs": 0.6, "speedup": 1.5}, TypeError, "got macs and speedup"),
        ({"macs": 0}, ValueError, "above 0 and at most 1, got 0"),
        ({"macs": 1.01}, ValueError, "at most 1, got 1.01"),
        ({"macs": "0.6"}, TypeError, "macs: expected a number, got '0.6'"),
        ({"macs": float("nan")}, ValueError, "got nan"),
        ({"speedup": 0.9}, ValueError, "expected 1 or more, got 0.9"),
        ({"speedup": float("inf")}, ValueError, "got inf"),
        ({"speedup": True}, TypeError, "speedup: expected a number, got True"),
        ({"multiple_of": 0}, ValueError, "multiple_of: expected 1 or more, got 0"),
        ({"multiple_of": 8.0}, TypeError, "multiple_of: expected an int, got 8.0"),
        ({"r": (8, 2)}, ValueError, "inflection"),
        ({"prop_attn": 1}, TypeError, "prop_attn must be True or False, got 1"),
        ({"prop_attn": None}, TypeError, "prop_attn must be True or False, got None"),
        ({"trace_source": "yes"}, TypeError, "trace_source must be True or False, got 'yes'"),
        ({"protected": 0}, TypeError, "protected must be a tuple .* got 0"),
        ({"protected": "0"}, TypeError, "protected must be a tuple .* got '0'"),
        ({"protected": {0}}, TypeError, "protected must be a tuple"),
        ({"protected": (0, -1)}, ValueError, "positions count from 0, got -1"),
        ({"protected": (True,)}, TypeError, "must hold int positions, got True"),
        ({"protected": [0.0]}, TypeError, r"must hold int positions, got 0\.0"),
        ({"protection": ()}, TypeError, "protection"),
    ],
)
def test_a_wrong_argument_is_refused_and_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ToMe(**arguments)


def test_protected_positions_are_sorted_and_unique() -> None:
    assert ToMe(protected=[3, 0, 3]) == ToMe(protected=(0, 3))
    assert ToMe(protected=[]).protected == ()
    (position,) = ToMe(protected=[np.int64(4)]).protected or ()
    assert type(position) is int
    assert ToMe.from_json(ToMe(np.int64(8), protected=[np.int64(4)]).to_json()).protected == (4,)


def test_counts_pads_a_list_and_refuses_one_too_long() -> None:
    assert ToMe([3, 1]).counts(4) == (3, 1, 0, 0)
    with pytest.raises(ValueError, match="r lists 2 counts but the model has 1 blocks"):
        ToMe([3, 1]).counts(1)


@pytest.mark.parametrize(
    ("method", "shown"),
    [
        (ToMe(), "ToMe(r=16)"),
        (ToMe([8, 4], prop_attn=False), "ToMe(r=[8, 4], prop_attn=False)"),
        (ToMe((8, -1), protected=(0,)), "ToMe(r=(8, -1.0), protected=(0,))"),
        (ToMe(trace_source=True), "ToMe(r=16, trace_source=True)"),
    ],
)
def test_repr_shows_what_is_not_the_default(method: ToMe, shown: str) -> None:
    assert repr(method) == shown


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "evot", "r": 8}, "unknown method 'evot'; known: .*'evit', .*'tome'"),
        ({"r": 8, "rate": 4}, r"unknown fields \['rate'\] .*known: .*'prop_attn'"),
    ],
)
def test_a_dict_of_something_else_is_refused_with_what_is_known(
    data: dict[str, Any], message: str
) -> None:
    with pytest.raises(TomeError, match=message):
        method_from_dict(data)


def test_a_dict_need_not_say_all() -> None:
    assert method_from_dict({}) == ToMe()
    assert method_from_dict({"r": [8]}) == ToMe([8])


# What a call asks for


def test_r_is_short_for_a_method_and_neither_is_the_default() -> None:
    assert resolve_method(None, 8) == ToMe(8)
    assert resolve_method(None, 0) == ToMe(0)
    assert resolve_method(None, []) == ToMe([])
    assert resolve_method(None, [13, 0]) == ToMe([13, 0])
    assert resolve_method(None, None) == ToMe(16)
    method = ToMe(4, prop_attn=False)
    assert resolve_method(method, None) is method


@pytest.mark.parametrize("r", [0, 8])
def test_a_method_and_r_together_are_an_error(r: int) -> None:
    with pytest.raises(TypeError, match="either method= or r=, not both"):
        resolve_method(ToMe(8), r)


@pytest.mark.parametrize("method", [8, "tome", ToMe, {"r": 8}])
def test_a_method_that_is_none_is_refused(method: Any) -> None:
    with pytest.raises(TypeError, match="method must be a tomepass method"):
        resolve_method(method, None)


def test_a_target_takes_the_place_of_the_counts() -> None:
    method = ToMe(macs=0.6, multiple_of=16)
    assert repr(method) == "ToMe(macs=0.6, multiple_of=16)"
    assert method.replace(r=8) == ToMe(8, multiple_of=16)
    assert ToMe(8).replace(speedup=1.5) == ToMe(speedup=1.5)
    assert ToMe(speedup=2).schedule.macs == ToMe(macs=0.5).schedule.macs == 0.5
    assert ToMe(8).schedule.macs is None
    with pytest.raises(ValueError, match="only for a model"):
        method.counts(12)
