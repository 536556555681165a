"""Properties are tried the same way every time, or deeply with a seed that is told."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import profiles
import pytest
from hypothesis import settings
from profiles import DEEP, examples


@pytest.fixture
def deep() -> Iterator[None]:
    before = settings()
    settings.load_profile("deep")
    yield
    settings.register_profile("before", before)
    settings.load_profile("before")


@pytest.fixture
def quick() -> Iterator[None]:
    before = settings()
    settings.load_profile("quick")
    yield
    settings.register_profile("before", before)
    settings.load_profile("before")


class _Config(SimpleNamespace):
    def getoption(self, name: str) -> Any:
        assert name == "--hypothesis-seed"
        return self.option.hypothesis_seed


def configured(seed: str | None = None) -> _Config:
    config = _Config(option=SimpleNamespace(hypothesis_seed=seed))
    profiles.pytest_configure(config)  # type: ignore[arg-type]
    return config


def told(config: _Config) -> list[str]:
    lines: list[str] = []
    reporter = SimpleNamespace(write_line=lines.append)
    profiles.pytest_terminal_summary(reporter, config)  # type: ignore[arg-type]
    return lines


def test_quick_ones_are_few_and_the_same_every_time(quick: None) -> None:
    assert examples(6).derandomize
    assert examples(6).max_examples == 6
    assert configured().option.hypothesis_seed is None
    assert told(configured()) == []


def test_deep_ones_are_many_with_a_fresh_seed_that_is_told(deep: None) -> None:
    assert not examples(6).derandomize
    assert examples(6).max_examples == DEEP >= 300
    assert examples(DEEP + 1).max_examples == DEEP + 1
    first, second = configured(), configured()
    assert first.option.hypothesis_seed != second.option.hypothesis_seed
    (line,) = told(first)
    assert f"--hypothesis-seed={first.option.hypothesis_seed}" in line


def test_a_seed_that_is_given_stays(deep: None) -> None:
    assert configured("7").option.hypothesis_seed == "7"
