"""AOTInductor packages: compiled for this machine's processor, run from Python or C++."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram

from tomepass.errors import NotExported

if TYPE_CHECKING:
    from tomepass.formats import Run


def write(program: ExportedProgram, path: Path) -> None:
    """Compiles a program and packs it with its weights.

    Raises:
        TomeError: if there is no C++ compiler.
    """
    from torch._inductor import aoti_compile_and_package, cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:  # torch raises a class of its own that moves between versions
        raise NotExported(
            "AOTInductor needs a C++ compiler, and there is none",
            advice="install g++, or name a compiler in the variable CXX",
        ) from error
    aoti_compile_and_package(program, package_path=str(path))


def load(path: Path) -> Run:
    """The compiled program in a package, as a function."""
    from torch._inductor import aoti_load_package

    compiled: Any = aoti_load_package(str(path))

    def run(call: Mapping[str, Any]) -> list[torch.Tensor]:
        with torch.no_grad():
            return pytree.tree_leaves(compiled(**call))

    return run
