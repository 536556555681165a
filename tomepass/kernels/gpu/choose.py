"""Which operators of a rewritten graph become Triton kernels on CUDA, and why the rest do not."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from tomepass.graphs.origin import carry_origin, carry_value, value_of
from tomepass.kernels.given import why_not
from tomepass.kernels.gpu.device import DTYPES, shared_memory
from tomepass.kernels.gpu.match import check_match, match_triton, unfit
from tomepass.kernels.gpu.merge import (
    MOST_CHANNELS,
    check_merge,
    check_unmerge,
    merge_norm_triton,
    merge_triton,
    unmerge_triton,
)
from tomepass.kernels.gpu.sources import sources_triton
from tomepass.ops.choices import CHOICES
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge, merge_size
from tomepass.ops.merging.side import merge_bias
from tomepass.ops.merging.unmerge import unmerge

aten = torch.ops.aten

SWITCH = "TOMEPASS_TRITON"
"""Environment variable: 0 keeps the composite operators."""


_LEAST_CAPABILITY = (8, 0)

# What decides or carries something in a rewritten graph and has no kernel.
_WITHOUT = (*(choice for choice in CHOICES if choice is not match), merge_bias)


class Lines(NamedTuple):
    """What became of a graph, for the report.

    Args:
        chosen: a line on each kind of kernel taken, and on what has none or was told to have none.
        fallen: on each reason why something that has a kernel stays with composite operators.
    """

    chosen: tuple[str, ...] = ()
    fallen: tuple[str, ...] = ()


def missing(device: torch.device) -> str:
    """Why there can be no Triton kernels at all; empty if there can."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'tomepass[gpu]')"
    if torch.cuda.is_available() and torch.version.hip is None:
        found = torch.cuda.get_device_capability(device)
        if found < _LEAST_CAPABILITY:
            return "Triton needs compute capability {}.{}, the device has {}.{}".format(
                *_LEAST_CAPABILITY, *found
            )
    return ""


def take_gpu_kernels(module: fx.GraphModule, device: torch.device) -> Lines:
    """Puts matches, merges and unmerges of a CUDA graph on Triton's kernels, in place.

    They have gradients, so a graph that is trained takes them too.
    """
    if os.environ.get(SWITCH) == "0":
        return Lines(chosen=(f"composite operators: {SWITCH}=0",))
    if reason := missing(device):
        return Lines(fallen=(f"composite operators: {reason}",))
    taking = _Taking(module.graph)
    taking.matches()
    taking.merges()
    taking.unmerges()
    module.recompile()
    return taking.lines()


class _Taking:
    """One graph, while its operators are replaced."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.taken: dict[str, int] = {}
        self.left: dict[str, int] = {}
        self.others = 0
        self.sources: dict[tuple[fx.Node, Any], tuple[fx.Node, fx.Node]] = {}

    def lines(self) -> Lines:
        taken = [f"{n} {name}: a Triton kernel" for name, n in self.taken.items()]
        without = {target._opname: len(self._calls(target)) for target in _WITHOUT}
        without["unmerge of other than rows"] = self.others
        taken += [
            f"{n} {name}: composite operators, there is no Triton kernel"
            for name, n in without.items()
            if n
        ]
        return Lines(tuple(taken), tuple(f"{n} {why}" for why, n in self.left.items()))

    def matches(self) -> None:
        for node in self._calls(match):
            keys = value_of(node.args[0])
            shape = tuple(_number(s) for s in keys.shape)
            memory = shared_memory(keys.device)
            reason = unfit(shape, keys.dtype, _ints(node.args[2]), memory)
            if reason := reason or why_not(check_match, node):
                self._leave("match", reason)
                continue
            node.target = match_triton
            self._take("match")

    def merges(self) -> None:
        sizes = {n.args: n for n in self._calls(merge_size)}
        for node in self._calls(merge):
            x = value_of(node.args[0])
            if reason := _unfit_rows(x) or why_not(check_merge, node):
                self._leave("merge", reason)
                continue
            size = sizes.pop(node.args[1:], None)
            if size is not None and size < node:
                size = None  # read before there is a merge
            self._merge(node, size)

    def _merge(self, node: fx.Node, size: fx.Node | None) -> None:
        x, sizes, assign, tokens = node.args
        x, added = _summands(node, x)
        norm = _norm(node)
        with self.graph.inserting_before(node):
            order, start = self._sources(node, assign, tokens)
            args: tuple[Any, ...] = (x, added, sizes, assign, order, start)
            target = merge_triton
            if norm is not None:
                target = merge_norm_triton
                args += (*norm.args[2:4], norm.args[4] if len(norm.args) > 4 else 1e-5)
            made = self._call(node, target, args)
            results = [(node, 0), (size, 1), (norm, 2)]
            taken = [(old, self._item(made, i, old)) for old, i in results if old is not None]
        for old, new in reversed(taken):
            old.replace_all_uses_with(new)
            self.graph.erase_node(old)
        for summand in (node.args[0],) if added is not None else ():
            if isinstance(summand, fx.Node) and not summand.users:
                self.graph.erase_node(summand)
        names = ["merge"] + ["sum before it"] * (added is not None)
        self._take(" with ".join(names + ["LayerNorm after it"] * (norm is not None)))

    def unmerges(self) -> None:
        for node in self._calls(unmerge):
            x, source, dim = node.args
            if value_of(x).ndim != 3 or dim != 1:
                self.others += 1  # of sizes and of scores: little, or not by rows
                continue
            if reason := _unfit_rows(value_of(x)) or why_not(check_unmerge, node):
                self._leave("unmerge", reason)
                continue
            node.target, node.args = unmerge_triton, (x, source)
            self._take("unmerge")

    # ---- details ---------------------------------------------------------------------------

    def _calls(self, target: Any) -> list[fx.Node]:
        return list(self.graph.find_nodes(op="call_function", target=target))

    def _sources(self, like: fx.Node, assign: Any, tokens: Any) -> tuple[fx.Node, fx.Node]:
        """The index map the other way round: made once, where it is first read."""
        if (assign, tokens) not in self.sources:
            made = self._call(like, sources_triton, (assign, tokens))
            self.sources[assign, tokens] = (
                self._item(made, 0, None),
                self._item(made, 1, None),
            )
        return self.sources[assign, tokens]

    def _call(self, like: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
        made = self.graph.call_function(target, args)
        carry_origin(made, like)
        made.meta["source_fn_stack"] = [(made.name, f"tome_{target._opname}")]
        return made

    def _item(self, made: fx.Node, index: int, old: fx.Node | None) -> fx.Node:
        item = self.graph.call_function(operator.getitem, (made, index))
        if old is not None:
            carry_value(item, old)
        return item

    def _take(self, name: str) -> None:
        self.taken[name] = self.taken.get(name, 0) + 1

    def _leave(self, name: str, reason: str) -> None:
        line = f"{name}: composite operators, for {reason}"
        self.left[line] = self.left.get(line, 0) + 1


def _unfit_rows(x: Tensor) -> str:
    if x.dtype not in DTYPES:
        return f"{x.dtype}"
    width = _number(x.shape[2])
    if width > MOST_CHANNELS:
        return f"{width} channels, a kernel takes {MOST_CHANNELS}"
    return ""


def _summands(node: fx.Node, x: Any) -> tuple[Any, Any]:
    """The operands of the residual sum that is merged, where nothing else reads it."""
    if x.target is not aten.add.Tensor or set(x.users) != {node} or x.kwargs:
        return x, None
    summands: tuple[Any, Any] = x.args
    if not all(isinstance(s, fx.Node) and _same_shape(s, x) for s in summands):
        return x, None
    if any(value_of(s).dtype not in DTYPES for s in summands):
        return x, None
    return summands


def _norm(node: fx.Node) -> fx.Node | None:
    """The LayerNorm over channels that reads what is merged."""
    width = value_of(node).shape[-1]
    for user in node.users:
        if user.target is not aten.layer_norm.default or user.args[0] is not node:
            continue
        shape, affine = user.args[1], user.args[2:4]
        known = len(affine) == 2 and all(isinstance(a, fx.Node) for a in affine)
        known = known and value_of(user).dtype == _promoted(node, affine[0])
        if known and list(shape) == [width] and not user.kwargs:  # type: ignore[arg-type]
            return user if all(_ready(a, node) for a in affine) else None
    return None


def _promoted(node: fx.Node, weight: Any) -> torch.dtype:
    """What the kernel answers in; autocast would have a LayerNorm answer in float32."""
    return torch.promote_types(value_of(node).dtype, value_of(weight).dtype)


def _ready(operand: Any, node: fx.Node) -> bool:
    return bool(operand < node)


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return isinstance(value_of(a), Tensor) and list(value_of(a).shape) == list(value_of(b).shape)


def _ints(values: Any) -> Sequence[int]:
    return [int(v) for v in values]


def _number(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)
