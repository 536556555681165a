"""Checks of the model that is given to an entry, before anything is captured."""

from __future__ import annotations

import torch
from torch import nn

from tomepass.errors import Refused
from tomepass.model.parallel import refuse_sharded


def check_model(model: object) -> None:
    """Refuses what is no module, what is compiled already, and what routes images to graphs."""
    from tomepass.handover.adaptive import AdaptiveModel

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise Refused(
            "the model is already compiled",
            advice="give the model itself, and compile what apply returns: "
            "torch.compile(tomepass.apply(model))",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise Refused(
            f"{type(model).__name__} is compiled by TorchScript: there is no Python to capture",
            advice="give the model that torch.jit.trace or torch.jit.script was given",
        )
    if isinstance(model, AdaptiveModel):
        raise Refused(
            f"the model is already merged with {model._tome.method!r}, which routes images to "
            "several graphs",
            advice="give merged.tome.original, or one of merged.tome.budgets, each of which "
            "is a graph of its own",
        )
    lazy = [n for n, m in model.named_modules() if _is_lazy(m)]
    if lazy:
        raise Refused(
            f"parameters of {type(model).__name__} have no shape yet: {lazy[0] or 'it'} is a lazy "
            "module",
            advice="call the model itself once, which makes them",
        )
    refuse_sharded(model)


def _is_lazy(module: nn.Module) -> bool:
    values = (*module._parameters.values(), *module._buffers.values())
    return any(value is not None and torch.nn.parameter.is_lazy(value) for value in values)
