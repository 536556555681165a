"""Which tokens come from the input: the others are protected.

Class, distillation, register and detection tokens are parameters that a ``cat`` put beside the
input's tokens. Walking back from the stream to that ``cat`` tells where they stand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tomepass.axis import Axis, argument, dimensions, is_pointwise, move, same, shape_of
from tomepass.structure import is_tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Origins:
    """Where the tokens of a stream come from.

    Args:
        from_input: for each position, whether the token depends on the user's input.
        given: the input itself already has the token axis: nothing built it in this graph.
    """

    from_input: tuple[bool, ...]
    given: bool

    @property
    def protected(self) -> tuple[int, ...]:
        """Positions of the tokens that do not come from the input."""
        return tuple(i for i, real in enumerate(self.from_input) if not real)


def trace_origins(entry: fx.Node, dim: int, data: frozenset[str]) -> Origins:
    """Origins of the positions along ``dim`` of the stream's entry."""
    return _Trace(entry.graph, data).origins(entry, dim)


def position_terms(entry: fx.Node, dim: int, data: frozenset[str]) -> tuple[fx.Node, ...]:
    """What is added to the tokens by position before the stream: position embeddings.

    They are operands with one row a token that no input reaches.
    """
    trace = _Trace(entry.graph, data)
    terms, seen, frontier = [], set(), [(entry, dim)]
    while frontier:
        node, axis = frontier.pop()
        if node in seen or node not in trace.dependent:
            continue
        seen.add(node)
        if is_pointwise(node):
            terms += [a for a in node.all_input_nodes if trace.by_position(node, a, axis)]
        for operand in node.all_input_nodes:
            if node.target is aten.cat.default or trace.windows(node, axis):
                frontier.append((operand, axis))
            elif (before := _axis_before(node, operand, axis)) is not None:
                frontier.append((operand, before))
    return tuple(terms)


class _Trace:
    def __init__(self, graph: fx.Graph, data: frozenset[str]) -> None:
        self.dependent: set[fx.Node] = set()
        for node in graph.nodes:
            if (node.op == "placeholder" and node.name in data) or (
                is_tensor(node) and any(a in self.dependent for a in node.all_input_nodes)
            ):
                self.dependent.add(node)

    def origins(self, node: fx.Node, dim: int) -> Origins:
        count = int(shape_of(node)[dim])
        if node not in self.dependent:
            return Origins((False,) * count, False)
        if node.op == "placeholder":
            return Origins((True,) * count, True)
        if node.target is aten.cat.default:
            return self._cat(node, dim)
        if self.windows(node, dim):
            return self._slice(node, dim)
        found = [
            self.origins(operand, source)
            for operand in node.all_input_nodes
            if operand in self.dependent
            and (source := _axis_before(node, operand, dim)) is not None
        ]
        if not found:
            return Origins((True,) * count, False)
        real = tuple(any(column) for column in zip(*(f.from_input for f in found), strict=True))
        return Origins(real, any(f.given for f in found))

    def by_position(self, node: fx.Node, operand: fx.Node, dim: int) -> bool:
        """Does ``operand`` bring one row a token that no input reaches?"""
        if operand in self.dependent or not is_tensor(operand):
            return False
        aligned = dim - (len(shape_of(node)) - len(shape_of(operand)))
        return aligned >= 0 and not same(shape_of(operand)[aligned], 1)

    def _cat(self, node: fx.Node, dim: int) -> Origins:
        along = dimensions(argument(node, 1, "dim", 0), len(shape_of(node)))
        parts = [self.origins(part, dim) for part in node.args[0]]  # type: ignore[union-attr, arg-type]
        given = any(p.given for p in parts)
        if along == (dim,):
            return Origins(tuple(r for p in parts for r in p.from_input), given)
        columns = zip(*(p.from_input for p in parts), strict=True)
        return Origins(tuple(any(c) for c in columns), given)

    def windows(self, node: fx.Node, dim: int) -> bool:
        """Is the node a slice along ``dim``, at fixed positions?"""
        if node.target is not aten.slice.Tensor:
            return False
        along = dimensions(argument(node, 1, "dim", 0), len(shape_of(node)))
        window = (argument(node, i, n) for i, n in ((2, "start"), (3, "end"), (4, "step")))
        return along == (dim,) and all(isinstance(w, (int, type(None))) for w in window)

    def _slice(self, node: fx.Node, dim: int) -> Origins:
        (operand,) = node.all_input_nodes
        whole = self.origins(operand, dim)
        window = slice(*(argument(node, i, n) for i, n in ((2, "start"), (3, "end"), (4, "step"))))
        return Origins(whole.from_input[window], whole.given)


def _axis_before(node: fx.Node, operand: fx.Node, dim: int) -> int | None:
    """The dimension of ``operand`` that becomes ``dim`` of ``node``, if one does."""
    shape = shape_of(operand)
    for source, size in enumerate(shape):
        if not same(size, shape_of(node)[dim]):
            continue
        if move(node, operand, Axis(source), size) == Axis(dim):
            return source
    return None
