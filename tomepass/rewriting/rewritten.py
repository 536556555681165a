"""The result of rewriting: the new graph, and which of its nodes are index maps and sizes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from tomepass.reading.mismatch import Mismatch


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph.

    Args:
        module: the graph, callable like the one it was made from.
        source: the name of the node that maps original tokens of the first stream to final
            ones; None if it is not traced, or nothing merges.
        sizes: the name of the sizes after each block of the first stream, if they were asked for:
            None while nothing was reduced.
        joined: with the sizes: the names of tokens that are made fewer and of where each goes, and
            how many are left, for every value that carries them.
        matches: for each stream and block, the name of its match, None where nothing merges.
        referenced: whether :mod:`tomepass.reference` knows all that was done.
        unmerged: where and why tokens are unmerged before a reader, for the report.
        returned: how each token sequence leaves the graph, by its name in the captured graph.
        renamed: for each node of the captured graph, the node that stands for it now.
    """

    module: fx.GraphModule
    source: str | None
    matches: tuple[tuple[str | None, ...], ...]
    referenced: bool
    unmerged: tuple[Mismatch, ...]
    returned: dict[str, str]
    renamed: dict[str, str]
    sizes: tuple[str | None, ...] = ()
    joined: tuple[tuple[str, str, int], ...] = ()


def dump(module: fx.GraphModule, name: str) -> None:
    """Writes a readable graph to ``TOMEPASS_DUMP``, numbered, if that is set."""
    folder = os.environ.get("TOMEPASS_DUMP")
    if not folder:
        return
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    number = len(list(path.glob("*.txt")))
    text = module.print_readable(print_output=False)
    (path / f"{number:02d}_{name}.txt").write_text(text)
