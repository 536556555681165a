"""Captures made once a process, for models that tests leave as they are.

A capture is never changed, and most tests are about what is read in it and made of it. Whatever is
*about* captures makes its own.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

_FOUND: dict[int, dict[Any, Any]] = {}


def once(make: Any, model: nn.Module, call: Any, *more: Any, **options: Any) -> Any:
    """``make(model, call, ...)``, or what it gave for the same model, form of call and modes.

    Values of tensors may differ: parameters and inputs are read when a graph runs.
    """
    if id(model) not in _FOUND:
        weakref.finalize(model, _FOUND.pop, id(model), None)
    found = _FOUND.setdefault(id(model), {})
    key = (make, _form(call), _form((more, options)), _modes(), _structure(model))
    if key not in found:
        found[key] = make(model, call, *more, **options)
    return found[key]


def _form(value: Any) -> str:
    """A call up to its tensors' values and its number of images, which captures leave open."""
    leaves, form = pytree.tree_flatten(value)
    batches = [v.shape[0] for v in leaves if isinstance(v, torch.Tensor) and v.ndim]
    batch = batches[0] if batches else 0
    told = [_told(v, batch) if isinstance(v, torch.Tensor) else v for v in leaves]
    return f"{form} {told}"


def _told(value: torch.Tensor, batch: int) -> tuple[Any, ...]:
    batched = value.ndim > 0 and value.shape[0] == batch
    return batched, value.shape[batched:], value.dtype, value.requires_grad


def _modes() -> tuple[Any, ...]:
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


def _structure(model: nn.Module) -> str:
    """All of a model but its numbers: modules, their plain attributes, kinds of parameters."""
    config = getattr(model, "config", None)
    parts = [
        (name, type(part), part.training, [v for v in vars(part).items() if _plain(v[1])])
        for name, part in model.named_modules()
    ]
    states = [*model.named_parameters(), *model.named_buffers()]
    kinds = [(name, v.shape, v.dtype, v.requires_grad) for name, v in states]
    attention = getattr(config, "_attn_implementation", None)
    return f"{parts} {kinds} {attention} {config and vars(config)}"


def _plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, tuple, torch.dtype)) or value is None
