"""The reason why something is not merged: what was expected, what was found, and where.

A :class:`Mismatch` is a value. Reports show it; with ``on_unmatched="raise"`` an error is made
of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tomepass.graphs.origin import source_line


@dataclass(frozen=True)
class Mismatch:
    """Why something is left alone: a value, not an exception.

    Args:
        reason: what was expected and what came.
        block: index of the block, if one is concerned.
        node: the graph node.
        source: the model's source line behind it.
        advice: what the user can do about it.
    """

    reason: str
    block: int | None = None
    node: str | None = None
    source: str | None = None
    advice: str | None = None

    @staticmethod
    def at(
        node: fx.Node, reason: str, *, block: int | None = None, advice: str | None = None
    ) -> Mismatch:
        """A mismatch at a node, with its source line."""
        return Mismatch(reason, block, node.name, source_line(node), advice)
