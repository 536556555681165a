"""Small named mutations of the package, each with the tests that must see it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One small change of the package that some test must notice.

    Args:
        name: what is broken, unique.
        file: the file changed, from the repository's root.
        old: its text, which occurs there once.
        new: what stands in its place.
        tests: pytest's arguments for the quickest tests that see it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
