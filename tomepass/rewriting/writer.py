"""Appends nodes to the new graph, each with a fake tensor in ``meta["val"]``.

Each node is run on fake tensors when it is written, so that shapes, dtypes and strides in the
metadata are those of the new graph and not of the captured one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tomepass.errors import Refused
from tomepass.graphs.nodes import is_known, same, shape_of, target_name
from tomepass.graphs.origin import carry_origin, source_line
from tomepass.ops.library import is_overhead
from tomepass.ops.results import RESULTS
from tomepass.reading.layouts import Layout
from tomepass.rewriting.any_batch import AnyBatch, NotTold

aten = torch.ops.aten

# Views that ask for a layout, and what they are where any will do.
_ANY_LAYOUT: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.view_as.default: aten.reshape_as.default,
}


class Writer:
    """A graph to which nodes are appended.

    Args:
        fake_mode: the mode of the fake tensors in ``meta["val"]``.

    Attributes:
        graph: the new graph.
        touched: the nodes whose values differ from those in the captured graph.
        constants: tensors that the new graph holds besides the captured ones, by attribute.
        block: the block that is being written, which errors name.
    """

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self.fake_mode = fake_mode
        self.graph = fx.Graph()
        self._any_batch = AnyBatch(fake_mode)
        self.touched: set[fx.Node] = set()
        self.constants: dict[str, Tensor] = {}
        self.block: int | None = None

    def emit(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator, marked as coming from where ``like`` does."""
        node = self.graph.call_function(target, args, kwargs)
        carry_origin(node, like)
        if is_overhead(node):  # compilers name their kernels after it
            node.meta["source_fn_stack"] = [(node.name, f"tome_{target._opname}")]
        self.execute(node)
        return node

    def constant(self, like: fx.Node, tensor: Tensor) -> fx.Node:
        """A tensor of the pass's own, which becomes a buffer of the graph."""
        name = f"_tome_{len(self.constants)}"
        self.constants[name] = tensor
        node = self.graph.create_node("get_attr", name, name=f"tome_constant{name[5:]}")
        carry_origin(node, like)
        node.meta["val"] = self.fake_mode.from_tensor(tensor, static_shapes=True)
        return node

    def module(self, captured: fx.GraphModule) -> fx.GraphModule:
        """What was written, with all it holds; ``captured`` is where it was copied from."""
        self.graph.lint()
        if not self.constants:
            return fx.GraphModule(captured, self.graph)
        held = {str(n.target): n for n in self.graph.nodes if n.op == "get_attr"}
        copied = {name: operator.attrgetter(name) for name in held if name not in self.constants}
        own = {name: tensor for name, tensor in self.constants.items() if name in held}
        root = {name: read(captured) for name, read in copied.items()} | own
        return fx.GraphModule(root, self.graph, type(captured).__name__)

    def execute(self, node: fx.Node) -> None:
        """Runs a node on the fake values of its inputs: its metadata is what it computes.

        Raises:
            TomeError: if the operator takes no such values.
        """
        if node.op != "call_function":
            raise self.error(node, f"cannot follow tokens through a {node.op}")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda a: a.meta["val"])
        before = node.meta.get("val")
        try:
            node.meta["val"] = self._result(RESULTS.get(node.target, node.target), args, kwargs)
        except Exception as error:
            raise self.error(
                node, f"{target_name(node)} does not fit the merged tokens: {error}"
            ) from error
        node.meta.pop("tensor_meta", None)
        _same_unknowns(self.fake_mode.shape_env, before, node.meta["val"])
        self.touched.add(node)

    def _result(self, operator: Any, args: Any, kwargs: Any) -> Any:
        try:
            return self._any_batch.returned(operator, args, kwargs)
        except NotTold:
            with self.fake_mode, _discarding(self.fake_mode.shape_env):
                return _on_fakes(operator, args, kwargs)

    def relaid(self, node: fx.Node) -> None:
        """Lets a copy of a view take what it reads in any layout.

        What comes before it may be laid out in memory as it was not when it was captured: kernels
        of attention differ in that, and a ``contiguous`` that had nothing to do left no node.
        """
        node.target = _ANY_LAYOUT.get(node.target, node.target)

    def heads_apart(self, like: fx.Node, x: fx.Node, heads: int | None) -> fx.Node:
        """``[B, H, N, D]`` of an operand of fused attention; None if that is what it is."""
        if heads is None:
            return x
        return self.emit(like, aten.reshape.default, x, [-1, heads, *shape_of(x)[-2:]])

    def slices(self, like: fx.Node, x: fx.Node, dim: int, indices: list[int]) -> fx.Node:
        """``x`` at ascending indices: a slice a run, concatenated."""
        runs: list[list[int]] = []
        for index in indices:
            if runs and index == runs[-1][1]:
                runs[-1][1] += 1
            else:
                runs.append([index, index + 1])
        parts = [self.emit(like, aten.slice.Tensor, x, dim, *run) for run in runs or [[0, 0]]]
        return parts[0] if len(parts) == 1 else self.emit(like, aten.cat.default, parts, dim)

    def compare(self, node: fx.Node, copy: fx.Node, layout: Layout, length: int) -> None:
        """Compares what was written with the plan.

        Raises:
            TomeError: if a token axis has another length than it should.
        """
        shape = shape_of(copy)
        for axis in layout.axes:
            if not same(shape[axis.dim], axis.before * length * axis.after):
                raise self.error(
                    node, f"expected {length} tokens on dimension {axis.dim}, got {list(shape)}"
                )

    def error(self, node: fx.Node, reason: str) -> Refused:
        """An error at a node, in the block being written."""
        return Refused(reason, block=self.block, node=node.name, source=source_line(node))


def _discarding(env: ShapeEnv | None) -> AbstractContextManager[None]:
    """New symbols for sizes that data decide are taken for the old ones right away."""
    return nullcontext() if env is None else env.ignore_fresh_unbacked_symbols()


def _same_unknowns(env: ShapeEnv | None, before: Any, after: Any) -> None:
    """Data decide the same sizes after a rewrite as before it: the symbols are one."""
    for old, new in zip(_sizes(before), _sizes(after), strict=False):
        pair = [_unknown(old), _unknown(new)]
        if env is not None and None not in pair and pair[0] != pair[1]:
            env._rename_unbacked_to(pair[1], pair[0])


def _sizes(value: Any) -> list[Any]:
    leaves = pytree.tree_leaves(value)
    return [
        size for leaf in leaves for size in (leaf.shape if isinstance(leaf, Tensor) else [leaf])
    ]


def _unknown(size: Any) -> Any:
    """The symbol of a size that data decide; None of any other, and of what is computed from it."""
    if not isinstance(size, torch.SymInt) or is_known(size):
        return None
    return size.node.expr if size.node.expr.is_symbol else None


def _on_fakes(run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    try:
        return run(*args, **kwargs)
    except RuntimeError as error:
        # C++ composites stumble over symbolic sizes (torch 2.11) that Python ones, slower, take.
        if "sym" not in str(error).lower():
            raise
        with enable_python_dispatcher():
            return run(*args, **kwargs)
