"""The examples in the docstrings of public names run as written."""

from __future__ import annotations

import doctest

import pytest

import tomepass

EXAMPLES = {
    name: found
    for name in tomepass.__all__
    if (found := doctest.DocTestParser().get_examples(getattr(tomepass, name).__doc__))
}


def test_the_errors_have_one_each() -> None:
    assert {"NotCaptured", "Refused", "NotTrained", "NotExported"} <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_gives_what_it_says(name: str) -> None:
    test = doctest.DocTest(EXAMPLES[name], {}, name, None, None, None)
    assert doctest.DocTestRunner().run(test).failed == 0
