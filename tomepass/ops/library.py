"""Registration of the ``tome::`` namespace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx


def is_overhead(node: fx.Node) -> bool:
    """Is the node one of the pass's own?"""
    return getattr(node.target, "namespace", None) == "tome"


_library = torch.library.Library("tome", "DEF")  # type: ignore[no-untyped-call]

COMPOSITES: dict[Any, Callable[..., Any]] = {}
"""Every composite operator and what it is composed of."""


def register(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Defines ``tome::<schema>`` with the decorated function as its composite kernel.

    Returns the operator overload, ready to stand in a graph.
    """

    def define(kernel: Callable[..., Any]) -> Any:
        name = schema.split("(")[0]
        _library.define(schema)  # type: ignore[no-untyped-call]
        _library.impl(name, kernel, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
        operator = getattr(torch.ops.tome, name).default
        COMPOSITES[operator] = kernel
        return operator

    return define


def register_for(
    device: str, schema: str, result: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Any]:
    """Defines ``tome::<schema>`` with the decorated function as its kernel on one device alone.

    The kernel takes tensors of any strides.

    Args:
        device: the dispatch key, such as ``"CPU"``.
        schema: as in :func:`register`.
        result: what it returns for fake tensors.
    """

    def define(kernel: Callable[..., Any]) -> Any:
        name = schema.split("(")[0]
        _library.define(schema, tags=(torch.Tag.flexible_layout,))  # type: ignore[no-untyped-call]
        _library.impl(name, kernel, device)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"tome::{name}", result, lib=_library)
        return getattr(torch.ops.tome, name).default

    return define


def register_differentiable(
    schema: str,
    result: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    context: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Defines ``tome::<schema>`` with the decorated function as its kernel on CPU and CUDA.

    Args:
        schema: as in :func:`register`.
        result: what it returns for fake tensors.
        backward: its gradients, in operators that have some themselves; None if it has none.
        context: what these need is kept by it, as ``torch.library.register_autograd`` says.
    """

    def define(kernel: Callable[..., Any]) -> Any:
        name = schema.split("(")[0]
        made = register_for("CUDA", schema, result)(kernel)
        _library.impl(name, kernel, "CPU")  # type: ignore[no-untyped-call]
        if backward is not None:
            torch.library.register_autograd(
                f"tome::{name}", backward, setup_context=context, lib=_library
            )
        return made

    return define


def without_autocast(device: torch.device) -> Any:
    """Matching and sizes are float32 work, whatever the model's autocast says."""
    if not torch.amp.is_autocast_available(device.type):  # a meta device
        return nullcontext()
    return torch.autocast(device_type=device.type, enabled=False)


def autocasts(device: torch.device) -> bool:
    """Does autocast change what operators compute on a device? A meta device has none."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for a value of ``dtype``: float64 stays exact, the rest widens."""
    return torch.promote_types(dtype, torch.float32)
