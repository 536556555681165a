"""Which tokens come from the input: the others are protected.

Class, distillation, register and detection tokens are parameters that a ``cat`` put beside the
input's tokens. Walking back from the stream to that ``cat`` tells where they stand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import fx

from tomepass.axis import Axis, argument, dimensions, is_pointwise, move, same, shape_of
from tomepass.structure import Ancestry, is_tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Origins:
    """Where the tokens of a stream come from.

    Args:
        from_input: for each position, whether the token depends on the user's input.
        given: the input itself already has the token axis: nothing built it in this graph.
        lost_at: an operator behind which tokens of the model's own may stand anywhere.
    """

    from_input: tuple[bool, ...]
    given: bool = False
    lost_at: fx.Node | None = None

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


def input_dependent(graph: fx.Graph, data: frozenset[str]) -> set[fx.Node]:
    """The tensors whose values depend on the user's inputs, not on their sizes alone."""
    dependent: set[fx.Node] = set()
    for node in graph.nodes:
        if (node.op == "placeholder" and node.name in data) or (
            is_tensor(node) and any(a in dependent for a in node.all_input_nodes)
        ):
            dependent.add(node)
    return dependent


class _Trace:
    def __init__(self, graph: fx.Graph, data: frozenset[str]) -> None:
        self.graph = graph
        self.dependent = input_dependent(graph, data)

    @cached_property
    def ancestry(self) -> Ancestry:
        return Ancestry(self.graph)

    def origins(self, node: fx.Node, dim: int) -> Origins:
        count = int(shape_of(node)[dim])
        if node not in self.dependent:
            return Origins((False,) * count)
        if node.op == "placeholder":
            return Origins((True,) * count, True)
        if node.target is aten.cat.default:
            return self._cat(node, dim)
        if self.windows(node, dim):
            return self._slice(node, dim)
        if node.target is aten.pad.default:
            return self._pad(node, dim)
        found = [
            self.origins(operand, source)
            for operand in node.all_input_nodes
            if operand in self.dependent
            and (source := _axis_before(node, operand, dim)) is not None
        ]
        if not found:
            mixed = any(self._mixes(above) for above in self.ancestry.of(node))
            return Origins((True,) * count, lost_at=node if mixed else None)
        columns = zip(*(f.from_input for f in found), strict=True)
        return _union(found, tuple(any(column) for column in columns))

    def by_position(self, node: fx.Node, operand: fx.Node, dim: int) -> bool:
        """Does ``operand`` bring one row a token that no input reaches?"""
        if operand in self.dependent or not is_tensor(operand):
            return False
        aligned = dim - (len(shape_of(node)) - len(shape_of(operand)))
        return aligned >= 0 and not same(shape_of(operand)[aligned], 1)

    def _cat(self, node: fx.Node, dim: int) -> Origins:
        along = dimensions(argument(node, 1, "dim", 0), len(shape_of(node)))
        parts = [self.origins(part, dim) for part in node.args[0]]  # type: ignore[union-attr, arg-type]
        if along == (dim,):
            return _union(parts, tuple(real for p in parts for real in p.from_input))
        columns = zip(*(p.from_input for p in parts), strict=True)
        return _union(parts, tuple(any(column) for column in columns))

    def _pad(self, node: fx.Node, dim: int) -> Origins:
        """Tokens appended as padding are the model's own; a position term makes them differ."""
        (operand,) = node.all_input_nodes
        amounts = list(argument(node, 1, "pad"))
        place = 2 * (len(shape_of(node)) - 1 - dim)  # pairs count from the last dimension
        whole = self.origins(operand, dim)
        pair = amounts[place : place + 2]
        if not any(pair):
            return whole
        if argument(node, 2, "mode", "constant") != "constant" or min(pair) < 0:
            return replace(whole, lost_at=node)
        before, after = pair
        return replace(whole, from_input=(False,) * before + whole.from_input + (False,) * after)

    def _mixes(self, node: fx.Node) -> bool:
        """Does the node put something of the model's own beside what comes from the input?"""
        parts = [part in self.dependent for part in node.all_input_nodes if is_tensor(part)]
        return node.target is aten.cat.default and any(parts) and not all(parts)

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
        return replace(whole, from_input=whole.from_input[window])


def _union(found: list[Origins], from_input: tuple[bool, ...]) -> Origins:
    lost = next((f.lost_at for f in found if f.lost_at is not None), None)
    return Origins(from_input, any(f.given for f in found), lost)


def _axis_before(node: fx.Node, operand: fx.Node, dim: int) -> int | None:
    """The dimension of ``operand`` that becomes ``dim`` of ``node``, if one does."""
    if not is_tensor(operand):
        return None
    shape = shape_of(operand)
    for source, size in enumerate(shape):
        if not same(size, shape_of(node)[dim]):
            continue
        if move(node, operand, Axis(source), size) == Axis(dim):
            return source
    return None
