"""The graph that all analysis reads, whichever way a model was captured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode


@dataclass(frozen=True)
class CanonicalGraph:
    """A captured graph, every tensor a placeholder.

    Args:
        module: the graph; placeholders in the order of the call.
        data: names of the placeholders that hold the user's inputs, not the model's state.
        learned: names of those that hold parameters.
        fragment: True if the graph may be a piece of a larger model (from Dynamo).
    """

    module: fx.GraphModule
    data: frozenset[str]
    fragment: bool
    learned: frozenset[str] = frozenset()

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        return self.module.graph

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The mode in which the nodes' values live."""
        values = [n.meta["val"] for n in self.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
        mode = detect_fake_mode(values)
        assert mode is not None
        return mode
