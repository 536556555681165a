"""Arguments of every way in that name one of a few choices."""

from __future__ import annotations

from typing import Literal

from tomepass.errors import Refused
from tomepass.methods import Method

OnUnmatched = Literal["raise", "warn"]

Outputs = Literal["original", "merged"]


def check_one_graph(method: Method, door: str) -> None:
    """Refuses a method that makes several graphs, where a door is about one."""
    if method.adaptive is not False:
        raise Refused(
            f"adaptive={method.adaptive!r} routes images to several graphs, {door} is about one",
            advice="give a method without adaptive=, or that of one budget: "
            "tomepass.apply(model, method, example_inputs=images).tome.budgets[0].tome.method",
        )


def check_choices(on_unmatched: object, outputs: object) -> None:
    """Refuses any other value of the two options that both doors have."""
    _one_of("on_unmatched", on_unmatched, ("raise", "warn"))
    _one_of("outputs", outputs, ("original", "merged"))


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
