"""What is asked of `apply`, `explain`, `check` and `export`: one of method, r and the targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from encoders import make, pixels

import tomepass
from tomepass import Method, ToMe
from tomepass.methods.asked import resolve_method

ASKED = {"r": 3, "keep_rate": 0.7, "macs": 0.8, "speedup": 1.2}
DEPTH = 2


def applied(model: Any, **asked: Any) -> Method:
    return tomepass.apply(model, example_inputs=pixels(), **asked).method


def explained(model: Any, **asked: Any) -> Method:
    return tomepass.explain(model, example_inputs=pixels(), **asked).method


def checked(model: Any, **asked: Any) -> Method:
    return tomepass.check(model, pixels(), inner="eager", **asked).method


@pytest.mark.parametrize("entry", [applied, explained])
@pytest.mark.parametrize("name", ASKED)
def test_a_keyword_is_short_for_a_method(entry: Callable[..., Method], name: str) -> None:
    asked = {name: ASKED[name]}
    assert entry(make(depth=DEPTH), **asked) == ToMe(**asked)  # type: ignore[arg-type]


def test_a_keyword_means_the_same_to_check() -> None:
    assert checked(make(depth=1), macs=0.9) == ToMe(macs=0.9)


@pytest.mark.deep
def test_a_keyword_means_the_same_to_export() -> None:
    model = make(depth=DEPTH)
    exported = tomepass.export(model, keep_rate=0.5, example_inputs=pixels())
    expected = tomepass.export(model, ToMe(keep_rate=0.5), example_inputs=pixels())
    assert exported.graph_module.code == expected.graph_module.code
    other = tomepass.export(model, keep_rate=0.9, example_inputs=pixels())
    assert exported.graph_module.code != other.graph_module.code


PAIRS = [(a, b) for a in ("method", *ASKED) for b in ASKED if a < b or a == "method"]


@pytest.mark.parametrize("entry", [applied, explained, checked])
def test_two_together_are_refused(entry: Callable[..., Method]) -> None:
    model = make(depth=1)
    for names in PAIRS:
        asked = {name: {"method": ToMe(3), **ASKED}[name] for name in names}
        with pytest.raises(TypeError, match=r"give (either|one of)") as raised:
            entry(model, **asked)
        assert all(name in str(raised.value) for name in names)


@pytest.mark.parametrize(("name", "wrong"), [("macs", 2), ("speedup", 0.5), ("keep_rate", 0)])
def test_a_target_out_of_its_range_is_refused(name: str, wrong: float) -> None:
    with pytest.raises(ValueError, match=name):
        applied(make(depth=1), **{name: wrong})


def test_a_merged_model_keeps_its_method_unless_another_is_asked_for() -> None:
    merged = tomepass.apply(make(depth=DEPTH), r=3, example_inputs=pixels())
    assert explained(merged) == ToMe(3)
    assert explained(merged, macs=0.8) == ToMe(macs=0.8)


def test_what_is_asked_for_in_vain_is_said_as_it_was_written() -> None:
    with pytest.raises(TypeError, match=r"macs=0\.8 is short for method=ToMe\(macs=0\.8\)"):
        resolve_method(ToMe(3), None, macs=0.8)
