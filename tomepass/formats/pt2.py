"""``torch.export`` archives: PyTorch runs them, with no need of tomepass or transformers."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram

from tomepass.errors import TomeError
from tomepass.sources.models import first_line

if TYPE_CHECKING:
    from tomepass.formats import Run


def write(program: ExportedProgram, path: Path) -> None:
    """Writes a program with ``torch.export.save``."""
    torch.export.save(program, path)


def load(path: Path) -> Run:
    """The program in a file, as a function.

    Raises:
        TomeError: if the file holds none.
    """
    module = load_module(path)

    def run(call: Mapping[str, Any]) -> list[torch.Tensor]:
        with torch.no_grad():
            return pytree.tree_leaves(module(**call))

    return run


def load_module(path: Path) -> Any:
    """The program in a file, as a module that takes keyword inputs.

    Raises:
        TomeError: if the file holds none.
    """
    advice = "give a file that torch.export.save or tomepass export --to pt2 wrote"
    if not path.is_file():
        raise TomeError(f"no such file: {str(path)!r}", advice=advice)
    if not zipfile.is_zipfile(path):
        raise TomeError(f"{path.name!r} {_no_archive(path)}", advice=advice)
    try:
        names = _checked_names(path)
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise TomeError(f"{path.name!r} is damaged: {first_line(error)}", advice=advice) from error
    if any("/data/aotinductor/" in name for name in names):
        raise TomeError(
            f"{path.name!r} is a package of AOTInductor",
            advice="load it with torch._inductor.aoti_load_package",
        )
    if not any(PurePosixPath(name).match("*/models/*.json") for name in names):
        raise TomeError(f"{path.name!r} is an archive without an exported program", advice=advice)
    try:
        return torch.export.load(path).module()
    except Exception as error:  # as of another version, or of operators that are not installed
        raise TomeError(
            f"{path.name!r} holds a program that PyTorch {torch.__version__} cannot load: "
            f"{type(error).__name__}: {first_line(error)}",
            advice=advice,
        ) from error


def _checked_names(path: Path) -> list[str]:
    """What an archive holds, every byte of it checked: PyTorch reads weights without."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged!r} is not what was written")
        return archive.namelist()


def _no_archive(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    return {b"": "is empty", b"PK\x03\x04": "is cut off"}.get(start, "is no archive")
