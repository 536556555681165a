"""Registration of the ``tome::`` namespace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("tome", "DEF")


def register(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Defines ``tome::<schema>`` with the decorated function as its composite kernel.

    Returns the operator overload, ready to stand in a graph.
    """

    def define(kernel: Callable[..., Any]) -> Any:
        name = schema.split("(")[0]
        _library.define(schema)
        _library.impl(name, kernel, "CompositeImplicitAutograd")
        return getattr(torch.ops.tome, name).default

    return define


def without_autocast(device: torch.device) -> Any:
    """Matching and sizes are float32 work, whatever the model's autocast says."""
    return torch.autocast(device_type=device.type, enabled=False)
