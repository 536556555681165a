"""``torch.export`` archives: PyTorch runs them, with no need of tomepass or transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram

from tomepass.errors import TomeError

if TYPE_CHECKING:
    from tomepass.doors import Run


def write(program: ExportedProgram, path: Path) -> None:
    """Writes a program with ``torch.export.save``."""
    torch.export.save(program, path)


def load(path: Path) -> Run:
    """The program in a file, as a function.

    Raises:
        TomeError: if the file holds none.
    """
    try:
        module = torch.export.load(path).module()
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise TomeError(
            f"{path.name!r} holds no exported program: {type(error).__name__}: "
            f"{next(iter(str(error).splitlines()), '')}",
            advice="give a file that torch.export.save or tomepass export --to pt2 wrote",
        ) from error

    def run(call: Mapping[str, Any]) -> list[torch.Tensor]:
        with torch.no_grad():
            return pytree.tree_leaves(module(**call))

    return run
