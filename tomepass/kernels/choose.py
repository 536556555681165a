"""Which operators of a rewritten graph get a kernel of their own, chosen by device and dtype.

| device | dtype | kernels |
|---|---|---|
| CPU | float32, bfloat16 | those of :mod:`tomepass.kernels.cpu` |
| CUDA, with triton | float32, bfloat16, float16 | those of ``gpu_match.py`` and ``gpu_merge.py`` |
| all others | | none: the composite operators |

Whatever a kernel would refuse when it runs (:mod:`tomepass.kernels.given`) keeps its composite
operator as well.

Kernels for the CPU have no gradients and need Inductor's compiler, so a graph that is trained or
handed to another backend keeps the composite operators. Those for CUDA have gradients, and run in
eager mode too. What is exported has the composite operators everywhere.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from tomepass.graphs.nodes import FUSED
from tomepass.graphs.origin import carry_origin, value_of
from tomepass.kernels.attention_gpu import take_gpu_attention
from tomepass.kernels.cpu import (
    check_match,
    check_merge,
    check_merge_bias,
    check_pad_keys,
    match_cpu,
    merge_bias_cpu,
    merge_cpu,
    pad_keys_cpu,
)
from tomepass.kernels.given import why_not
from tomepass.kernels.gpu.choose import take_gpu_kernels
from tomepass.ops.attending.log_size import log_size
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge, merge_size
from tomepass.ops.merging.side import merge_bias

_PAD = torch.ops.aten.constant_pad_nd.default


class Taken(NamedTuple):
    """Lines for the report, of CUDA graphs.

    Args:
        kernels: on each kind of kernel, taken or not.
        paths: of attention.
        fallen: those of ``kernels`` on what has a kernel and could not take it.
    """

    kernels: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    fallen: tuple[str, ...] = ()


def take_kernels(module: fx.GraphModule, *, trains: bool = False) -> Taken:
    """Puts matches, merges and padded keys of a graph on kernels of their own, in place.

    Args:
        module: a rewritten graph, or Dynamo's graph of a module that holds one.
        trains: gradients are needed.

    Returns:
        for CUDA, a line on each kind of kernel that was taken or was not.
    """
    if on_cuda(module):
        (merged, *_) = module.graph.find_nodes(op="call_function", target=merge)
        lines = take_gpu_kernels(module, value_of(merged.args[0]).device)
        return Taken((*lines.chosen, *lines.fallen), take_gpu_attention(module), lines.fallen)
    if not trains:
        _take_cpu_kernels(module)
    return Taken()


def on_cuda(module: fx.GraphModule) -> bool:
    """Does a graph merge tokens on a CUDA device?"""
    merges = module.graph.find_nodes(op="call_function", target=merge)
    return any(value_of(node.args[0]).device.type == "cuda" for node in merges)


def _take_cpu_kernels(module: fx.GraphModule) -> None:
    for node in module.graph.find_nodes(op="call_function", target=match):
        if _takes(check_match, node):
            node.target = match_cpu
    sizes = {n.args: n for n in module.graph.find_nodes(op="call_function", target=merge_size)}
    for node in module.graph.find_nodes(op="call_function", target=merge):
        if _takes(check_merge, node):
            size = sizes.get(node.args[1:])
            together = size is not None and node < size
            _merge_at_once(node, sizes.pop(node.args[1:]) if together else None)
    for node in module.graph.find_nodes(op="call_function", target=merge_bias):
        if _takes(check_merge_bias, node):  # one for all images, from all queries to all keys
            node.target = merge_bias_cpu
    for node in module.graph.find_nodes(op="call_function", target=FUSED):
        if _pads_keys(node):
            _pad_at_once(node)
    module.recompile()


def _takes(check: Callable[..., None], node: fx.Node, args: Sequence[Any] = ()) -> bool:
    """Whether a kernel for the CPU takes what a node, or these arguments, would give it."""
    return value_of(node.args[0]).device.type == "cpu" and not why_not(check, node, args)


def _merge_at_once(node: fx.Node, size: fx.Node | None) -> None:
    """Merged tokens and their sizes from one pass."""
    _replace((node, size), node, merge_cpu, node.args)


def _pads_keys(attention: fx.Node) -> bool:
    """Whether keys, values and log(size) are padded just before an attention."""
    operands = attention.args[1:4]
    if len(operands) < 3 or not all(
        isinstance(x, fx.Node) and x.target is _PAD and len(x.users) == 1 for x in operands
    ):
        return False
    keys, values, bias = (x.args[0] for x in operands)  # type: ignore[union-attr]
    if bias.target is not log_size:  # type: ignore[union-attr]
        return False
    missing = operands[0].args[1][-1]  # type: ignore[union-attr, index]
    sizes = bias.args[0]  # type: ignore[union-attr]
    return _takes(check_pad_keys, attention, (keys, values, sizes, missing))


def _pad_at_once(attention: fx.Node) -> None:
    """Keys, values and log(size), padded in one pass."""
    padded: list[Any] = list(attention.args[1:4])
    (keys, edges, _), (values, *_), (bias, *_) = (node.args for node in padded)
    _replace(padded, attention, pad_keys_cpu, (keys, values, bias.args[0], edges[-1]))
    if not bias.users:
        bias.graph.erase_node(bias)


def _replace(old: Sequence[fx.Node | None], at: fx.Node, kernel: Any, args: Any) -> None:
    """Nodes, by one kernel that computes them all in this order; None is computed in vain."""
    graph = at.graph
    with graph.inserting_before(at):
        made = graph.call_function(kernel, args)
        carry_origin(made, at)
        taken = [graph.call_function(operator.getitem, (made, i)) for i, n in enumerate(old) if n]
    for new, node in zip(taken, filter(None, old), strict=True):
        new.meta["val"] = value_of(node)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
