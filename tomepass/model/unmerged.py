"""The model itself, called for what it answers: whose error it is, and what has no values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tomepass.errors import TomeError, first_lines, passes
from tomepass.model.calls import call_with, describe_inputs
from tomepass.model.twin import Twin


@contextmanager
def the_models_own(
    model: nn.Module, call: Mapping[str, Any], doing: str = "raises"
) -> Iterator[None]:
    """Around a run of the user's model, nothing merged: what it raises is told as the model's.

    What says that memory ran out passes as it is.

    Args:
        model: that runs.
        call: its inputs.
        doing: what it does, after "the model itself".

    Raises:
        TomeError: if anything is raised inside, which is its cause.
    """
    try:
        yield
    except Exception as error:
        if passes(error):
            raise
        raise TomeError(
            f"{type(model).__name__} itself {doing} for inputs {describe_inputs(dict(call))}, "
            f"nothing merged: {type(error).__name__}: {first_lines(error)}",
            advice="call the model itself with these inputs first; the traceback begins with what "
            "the model raises",
        ) from error


def answer_of(model: nn.Module, call: Mapping[str, Any]) -> Any:
    """What the model itself answers.

    Raises:
        TomeError: if the model raises, which is its cause.
    """
    with the_models_own(model, call):
        return call_with(model, call)


def in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its floating-point state in another precision; the model stays as it is.

    A structural clone, since not everything that hangs on a model can be copied.
    """
    twin = Twin(model, noting=False).model
    cast: dict[int, Tensor] = {}  # what is shared stays shared

    def as_asked(value: Tensor | None) -> Tensor | None:
        if value is None or not value.is_floating_point():
            return value
        if id(value) not in cast:
            cast[id(value)] = found = value.detach().to(dtype)
            if isinstance(value, nn.Parameter):
                cast[id(value)] = nn.Parameter(found, value.requires_grad)
        return cast[id(value)]

    for module in twin.modules():
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in held:
            tensors.update({name: as_asked(value) for name, value in tensors.items()})
    return twin


def check_values(model: nn.Module, call: Mapping[str, Any], entry: str) -> None:
    """Refuses what has shapes alone, where something is computed.

    Raises:
        TomeError: if an input, a parameter or a buffer is on the meta device, or a fake tensor.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = {"inputs": pytree.tree_leaves(call), "model's parameters": state.values()}
    for what, values in held.items():
        if any(isinstance(v, Tensor) and (v.is_meta or isinstance(v, FakeTensor)) for v in values):
            raise TomeError(
                f"{entry} computes with values, and some of the {what} have shapes alone: they are "
                "on the meta device, or fake tensors",
                advice="give real ones; tomepass.explain tells what can be told without values",
            )
