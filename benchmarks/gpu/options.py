"""What is compiled in which mode, and whether a figure is what was hoped for."""

from __future__ import annotations

from typing import Any


def options_of(mode: str) -> dict[str, Any]:
    """A mode of ``torch.compile`` as Inductor's options."""
    from torch._inductor import list_mode_options

    return {} if mode == "default" else dict(list_mode_options(mode))


def verdict(reached: bool) -> str:
    """For the last column of a table."""
    return "yes" if reached else "NO"
