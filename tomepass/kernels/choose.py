"""Which operators of a rewritten graph get a kernel of their own, chosen by device and dtype.

| device | dtype | kernels |
|---|---|---|
| CPU | float32, bfloat16 | ``tome::match_cpu``, ``tome::merge_cpu`` |
| all others | | none: the composite operators |

Kernels have no gradients and need Inductor's compiler, so a graph that is trained, exported or
handed to another backend keeps the composite operators.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from tomepass.kernels.cpu import DTYPES, match_cpu, merge_cpu
from tomepass.ops.match import match
from tomepass.ops.merge import merge, merge_size


def take_kernels(module: fx.GraphModule) -> None:
    """Puts the matches and merges of a graph on kernels of their own, in place.

    Args:
        module: a rewritten graph, or Dynamo's graph of a module that holds one.
    """
    for node in module.graph.find_nodes(op="call_function", target=match):
        if _takes(node.args[0]):
            node.target = match_cpu
    sizes = {n.args: n for n in module.graph.find_nodes(op="call_function", target=merge_size)}
    for node in module.graph.find_nodes(op="call_function", target=merge):
        if _takes(node.args[0]):
            size = sizes.get(node.args[1:])
            together = size is not None and node < size
            _merge_at_once(node, sizes.pop(node.args[1:]) if together else None)
    module.recompile()


def _takes(operand: Any) -> bool:
    value = _value(operand)
    return value.device.type == "cpu" and value.dtype in DTYPES


def _value(node: fx.Node) -> Any:
    return node.meta["val"] if "val" in node.meta else node.meta["example_value"]


def _merge_at_once(node: fx.Node, size: fx.Node | None) -> None:
    """Merged tokens and their sizes from one pass."""
    found = [(place, old) for place, old in enumerate((node, size)) if old is not None]
    with node.graph.inserting_before(node):
        both = node.graph.call_function(merge_cpu, node.args)
        both.meta.update(node.meta)
        taken = [node.graph.call_function(operator.getitem, (both, place)) for place, _ in found]
    for new, (_, old) in zip(taken, found, strict=True):
        new.meta["val"] = _value(old)
        old.replace_all_uses_with(new)
        node.graph.erase_node(old)
