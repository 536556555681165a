"""What a merged module holds besides the model: the method, the options and the captures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from tomepass.handover.captures import Captures
from tomepass.methods import Method
from tomepass.model.calls import Inputs, as_call, check_call


@dataclass(frozen=True, eq=False)
class Tome:
    """What a merged model has that its model has not.

    Args:
        model: the model.
        method: what is done.
        on_unmatched: ``"raise"`` or ``"warn"``.
        outputs: ``"original"`` or ``"merged"``.
        captures: what has been captured of the model.
        inputs: of its methods, by name, as they are asked for.
        ways: how methods that attend on their own are called, by name.
    """

    model: nn.Module
    method: Method
    on_unmatched: Any
    outputs: Any
    captures: Captures
    inputs: dict[str, Inputs] = field(default_factory=dict)
    ways: dict[str, Any] = field(default_factory=dict)

    def bind(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], method: str = "forward"
    ) -> dict[str, Any]:
        """Positional and keyword inputs of a method as one call.

        Raises:
            TypeError: if there are too many, or one is given twice.
            TomeError: if no capture can stand for them.
        """
        if method not in self.inputs:
            self.inputs[method] = Inputs.of(self.model, method)
        call = self.inputs[method].bind(args, kwargs)
        if not torch.compiler.is_dynamo_compiling():
            check_call(call, self.inputs[method].owner)
        return call

    def call_of(self, inputs: Any) -> dict[str, Any]:
        """Inputs of the forward, as a tensor, a tuple or a dict, as one call."""
        return self.bind(*as_call(inputs))


class Knowing(Protocol):
    """A module that stands in for a model and knows how its methods are called."""

    _tome: Tome

    def _tome_answer(self, call: dict[str, Any], method: str) -> Any:
        """What the merged graph answers for keyword inputs of a method."""
        ...
