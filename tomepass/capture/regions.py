"""Inlines the subgraphs that Dynamo keeps apart, such as checkpointed or nested compile regions.

Each is called by a higher-order operator. Inlined, its operators are part of the graph like all
others.
"""

from __future__ import annotations

import importlib
import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

higher = torch.ops.higher_order

# Which arguments come before a region's operands: the body first, for one a name of it.
_INLINED: dict[Any, int] = {
    higher.tag_activation_checkpoint: 1,
    higher.invoke_subgraph: 2,
}


# What ``nested_compile_region`` calls, looked up in its module, whose name an operator hides.
_HOME = importlib.import_module("torch._higher_order_ops.invoke_subgraph")


_PLACEHOLDER = "invoke_subgraph_placeholder"


@contextmanager
def regions_in_place() -> Iterator[None]:
    """In the block, this thread runs regions compiled once for many calls as plain functions.

    ``torch.export`` would have Dynamo make a graph of each, in which neither what is read of the
    model nor its source lines can be seen.
    """
    mine, placeholder = threading.get_ident(), getattr(_HOME, _PLACEHOLDER)

    def called(function: Any, *args: Any, **kwargs: Any) -> Any:
        # Dynamo knows the placeholder itself: it stands in a branch of ``torch.cond``, say.
        if torch.compiler.is_dynamo_compiling() or threading.get_ident() != mine:
            return placeholder(function, *args, **kwargs)
        return function(*args, **kwargs)

    setattr(_HOME, _PLACEHOLDER, called)
    try:
        yield
    finally:
        setattr(_HOME, _PLACEHOLDER, placeholder)


class Inlining(fx.Interpreter):
    """Runs a Dynamo graph with its regions in their places.

    Checkpointed regions (``torch.utils.checkpoint``) are marked as such node by node, as
    AOTAutograd reads it: what stands in them may be computed again in the backward. A region
    compiled once for many calls (``torch.compiler.nested_compile_region``) is written out at each.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        marks: Mapping[str, Any] | None = None,
        numbers: Iterator[int] | None = None,
    ) -> None:
        super().__init__(module)
        self.marks = dict(marks or {})
        self.numbers = itertools.count() if numbers is None else numbers

    def run_node(self, n: fx.Node) -> Any:
        """One node, its marks beside what else its graph says of it."""
        added = {name: value for name, value in self.marks.items() if name not in n.meta}
        n.meta.update(added)
        try:
            return super().run_node(n)
        finally:
            for name in added:
                del n.meta[name]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator; of a region, what stands in it."""
        if target not in _INLINED:
            return super().call_function(target, args, kwargs)
        marks = self.marks
        if target is higher.tag_activation_checkpoint:
            policy = CheckpointPolicy.PREFER_RECOMPUTE
            marks = {"recompute": policy, "ac_graph_id": next(self.numbers)}
        return Inlining(args[0], marks, self.numbers).run(*args[_INLINED[target] :])


def traced_by_dynamo(module: fx.GraphModule) -> bool:
    """Does a graph hold what Dynamo traced while it was captured: branches, steps of a loop?"""
    return any(next(bodies(n), None) is not None for n in module.graph.nodes)


def bodies(node: fx.Node) -> Iterator[fx.GraphModule]:
    """The graphs that an operator runs: the branches of ``torch.cond``, the step of a loop."""
    owner = node.graph.owning_module
    for operand in node.all_input_nodes if owner is not None else ():
        if operand.op == "get_attr":
            held: Any = owner
            for name in str(operand.target).split("."):
                held = getattr(held, name, None)
            if isinstance(held, fx.GraphModule):
                yield held
