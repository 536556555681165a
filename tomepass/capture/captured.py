"""A captured model: its graph, where to read its parameters, and for which calls it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from tomepass.graphs.canonical import CanonicalGraph
from tomepass.model.batches import ANY, Form
from tomepass.model.guards import Guards


@dataclass(frozen=True)
class Capture:
    """A model captured through ``torch.export`` for one call signature.

    Args:
        graph: the canonical graph.
        state: for each leading placeholder, the model's attribute path or the tensor itself
            (a constant the model does not own).
        out_spec: rebuilds the model's output class from the graph's flat outputs.
        example: the flat example inputs the capture was made with.
        guards: whether the model still is what was captured.
        form: how it takes the batch.
        grad: whether gradients were enabled.
        wanted: which inputs wanted gradients, where the model asks.
        closed: why the batch is not open, or the first tensor alone is batched.
        uncompared: why it could not be compared with the model.
    """

    graph: CanonicalGraph
    state: tuple[str | Tensor, ...]
    out_spec: pytree.TreeSpec
    example: tuple[Any, ...]
    guards: Guards
    form: Form = ANY
    grad: bool = True
    wanted: tuple[bool, ...] | None = None
    closed: str | None = None
    uncompared: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of it, in words."""
        notes = [] if self.uncompared is None else [self.uncompared]
        if self.form.size is not None:
            notes.append(
                f"captured for a batch of {self.form.size} alone, since torch.export cannot leave "
                f"the batch open ({self.closed}): every other batch size is a capture of its own"
            )
        return tuple(notes)

    def stands_for(self, call: dict[str, Any]) -> bool:
        """Is the model what it was, and are the inputs what it asked of them?"""
        asked = self.wanted is None or self.wanted == gradients_wanted(call)
        return asked and self.guards.hold()

    @classmethod
    def of_nothing(cls, guards: Guards) -> Capture:
        """What stands in the place of a capture where none can be made: a graph of nothing."""
        graph = fx.Graph()
        graph.output(())
        empty = CanonicalGraph(fx.GraphModule(nn.Module(), graph), frozenset(), fragment=False)
        return cls(empty, (), pytree.tree_structure(()), (), guards)


def gradients_wanted(inputs: Any) -> tuple[bool, ...]:
    """Which of the tensors among some inputs want gradients."""
    return tuple(v.requires_grad for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor))


def read_state(model: nn.Module, capture: Capture) -> list[Tensor]:
    """The parameters and buffers a capture needs, as the model holds them now."""
    return [path if isinstance(path, Tensor) else _attribute(model, path) for path in capture.state]


def _attribute(model: nn.Module, path: str) -> Tensor:
    value: Any = model
    for name in path.split("."):
        # Dynamo looks through what is compiled already, which then has no _orig_mod.
        value = getattr(value, name, value) if name == "_orig_mod" else getattr(value, name)
    return value  # type: ignore[no-any-return]
