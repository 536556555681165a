"""How hard hypothesis tries: ``HYPOTHESIS_PROFILE=deep``, or ``quick`` where nothing is said.

    @examples(60)  # quickly as many, the same every time; deep at least 300, fresh ones
    @given(...)
    def test_a_property(...): ...

A deep run tells its seed at the end, and another begins there with ``--hypothesis-seed=N``. What it
finds becomes an ``@example`` of its own, or a test by name.
"""

from __future__ import annotations

import os
import secrets
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

_SLOW = [HealthCheck.too_slow]
DEEP = 300
"""Examples of each property, at least."""

settings.register_profile(
    "quick", deadline=None, derandomize=True, max_examples=50, suppress_health_check=_SLOW
)
settings.register_profile(
    "deep",
    deadline=None,
    derandomize=False,
    max_examples=DEEP,
    print_blob=True,
    suppress_health_check=_SLOW,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def examples(count: int) -> settings:
    """As many examples of a property, or as many as a deep profile asks for."""
    known = settings()
    return settings(max_examples=count if known.derandomize else max(count, known.max_examples))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A deep run has one seed, fresh unless one is given; workers get that of their controller."""
    if not settings().derandomize and config.getoption("--hypothesis-seed") is None:
        config.option.hypothesis_seed = str(secrets.randbits(32))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Says how a deep run is repeated."""
    if not settings().derandomize:
        seed = config.getoption("--hypothesis-seed")
        terminalreporter.write_line(
            f"hypothesis: {settings().max_examples} examples a property or more, "
            f"--hypothesis-seed={seed}"
        )
