"""Checks of options that several entries have in common, such as ``on_unmatched``."""

from __future__ import annotations

from typing import Literal

from tomepass.errors import Refused
from tomepass.methods import Method

OnUnmatched = Literal["raise", "warn"]

Outputs = Literal["original", "merged"]


def check_one_graph(method: Method, entry: str) -> None:
    """Refuses a method that makes several graphs, for an entry that works on one."""
    if method.adaptive is not False:
        raise Refused(
            f"adaptive={method.adaptive!r} routes images to several graphs, {entry} is about one",
            advice="give a method without adaptive=, or that of one budget: "
            "tomepass.apply(model, method, example_inputs=images).tome.budgets[0].tome.method",
        )


def check_choices(on_unmatched: object, outputs: object) -> None:
    """Refuses any other value of the two options that ``apply`` and the backend have."""
    _one_of("on_unmatched", on_unmatched, ("raise", "warn"))
    _one_of("outputs", outputs, ("original", "merged"))


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
