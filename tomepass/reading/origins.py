"""Tells which tokens of a stream are made from the input; all others are protected.

Class, distillation, register and detection tokens are parameters of the model, which a ``cat``
puts beside the tokens of the input. Following the stream's first value back to that ``cat`` tells
their positions. Protected tokens are never merged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import fx

from tomepass.graphs.nodes import (
    argument,
    dimensions,
    is_known,
    is_pointwise,
    is_tensor,
    same,
    shape_of,
)
from tomepass.graphs.walks import answered
from tomepass.reading.axis import Axis, move
from tomepass.reading.structure import Ancestry

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
        self.known: dict[tuple[fx.Node, int], Origins] = {}

    @cached_property
    def ancestry(self) -> Ancestry:
        return Ancestry(self.graph)

    def origins(self, node: fx.Node, dim: int) -> Origins:
        return answered((node, dim), self.known, self._needs, self._answer)

    def _needs(self, place: tuple[fx.Node, int]) -> list[tuple[fx.Node, int]]:
        """The operands whose tokens become those of a node, and where they stand in them."""
        node, dim = place
        if node not in self.dependent or node.op == "placeholder":
            return []
        if node.target is aten.cat.default:
            return [(part, dim) for part in node.args[0]]  # type: ignore[misc, union-attr]
        if self.windows(node, dim) or node.target is aten.pad.default:
            return [(node.all_input_nodes[0], dim)]
        return [
            (operand, source)
            for operand in node.all_input_nodes
            if operand in self.dependent
            and (source := _axis_before(node, operand, dim)) is not None
        ]

    def _answer(self, place: tuple[fx.Node, int]) -> Origins:
        node, dim = place
        size = shape_of(node)[dim]
        if not is_known(size):
            return Origins((), lost_at=node)
        count = int(size)
        if node not in self.dependent:
            return Origins((False,) * count)
        if node.op == "placeholder":
            return Origins((True,) * count, True)
        found = [self.known[need] for need in self._needs(place)]
        if any(f.lost_at is not None and not f.from_input for f in found):
            return Origins((True,) * count, lost_at=node)
        if node.target is aten.cat.default:
            return self._cat(node, dim, found)
        if self.windows(node, dim):
            window = _window(node)
            return replace(found[0], from_input=found[0].from_input[window])
        if node.target is aten.pad.default:
            return self._pad(node, dim, found[0])
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

    def _cat(self, node: fx.Node, dim: int, parts: list[Origins]) -> Origins:
        along = dimensions(argument(node, 1, "dim", 0), len(shape_of(node)))
        if along == (dim,):
            return _union(parts, tuple(real for p in parts for real in p.from_input))
        columns = zip(*(p.from_input for p in parts), strict=True)
        return _union(parts, tuple(any(column) for column in columns))

    def _pad(self, node: fx.Node, dim: int, whole: Origins) -> Origins:
        """Tokens appended as padding are the model's own; a position term makes them differ."""
        amounts = list(argument(node, 1, "pad"))
        place = 2 * (len(shape_of(node)) - 1 - dim)  # pairs count from the last dimension
        pair = amounts[place : place + 2]
        if not all(isinstance(amount, int) for amount in pair):
            return replace(whole, lost_at=node)
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


def _window(node: fx.Node) -> slice:
    return slice(*(argument(node, i, n) for i, n in ((2, "start"), (3, "end"), (4, "step"))))


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
