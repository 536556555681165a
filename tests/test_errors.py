"""The one error class: what it says, and that it survives travel."""

from __future__ import annotations

import copy
import pickle

import pytest

from tomepass import TomeError

FULL = TomeError(
    "expected a residual sum, got aten.mul",
    block=0,
    node="mul_3",
    source="modeling.py:12: x = x * y",
    advice="remove the product",
)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TomeError("no attention"), "no attention"),
        (TomeError("no attention", block=3), "no attention [block 3]"),
        (TomeError("no attention", block=0), "no attention [block 0]"),
        (
            TomeError("no attention", node="add", source="a.py:1"),
            "no attention [node add, at a.py:1]",
        ),
        (TomeError("no mask", advice="call it without"), "no mask\n  What to do: call it without"),
        (
            FULL,
            "expected a residual sum, got aten.mul "
            "[block 0, node mul_3, at modeling.py:12: x = x * y]\n"
            "  What to do: remove the product",
        ),
    ],
)
def test_the_message_names_what_is_known_and_nothing_else(error: TomeError, message: str) -> None:
    assert str(error) == message


def test_the_fields_can_be_read_one_by_one() -> None:
    assert FULL.reason == "expected a residual sum, got aten.mul"
    assert (FULL.block, FULL.node) == (0, "mul_3")
    assert FULL.source == "modeling.py:12: x = x * y"
    assert FULL.advice == "remove the product"
    bare = TomeError("no attention")
    assert (bare.block, bare.node, bare.source, bare.advice) == (None, None, None, None)


def test_it_is_caught_as_a_runtime_error() -> None:
    with pytest.raises(RuntimeError, match="no attention"):
        raise TomeError("no attention")


@pytest.mark.parametrize("error", [FULL, TomeError("no attention")])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_keeps_message_and_fields(error: TomeError, protocol: int) -> None:
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is TomeError
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_a_copy_keeps_message_and_fields() -> None:
    for again in (copy.copy(FULL), copy.deepcopy(FULL)):
        assert (str(again), vars(again)) == (str(FULL), vars(FULL))
