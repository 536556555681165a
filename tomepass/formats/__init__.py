"""Formats an exported program is written in, one file each; each imports its runtime when used.

A format is two functions: ``write(program, path)`` and ``load(path)``, which returns a
:data:`Run`.

May import: handover and every floor below.
Start reading: ``exporting.py`` (`tomepass.export`), then ``artifacts.py``, which writes a program
for a runtime and runs it there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tomepass.errors import TomeError
from tomepass.sources.extras import import_extra

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

    Run = Callable[[Mapping[str, Any]], list[Tensor]]
    """Runs a written program on keyword inputs; its outputs, flat."""


@dataclass(frozen=True)
class Door:
    """A format and its runtime.

    Args:
        name: as in ``--to``.
        suffix: its files end with.
        module: under :mod:`tomepass.formats`.
        needs: modules that writing and running import, beside torch.
        extra: of this package, that installs them.
        runtime: what runs its files.
        beside: the name of a second file that it may write, in terms of ``name`` and ``stem``.
        most: images of the largest batch of a dynamic one; None for any.
    """

    name: str
    suffix: str
    module: str
    needs: tuple[str, ...]
    extra: str | None
    runtime: str
    beside: str | None = None
    most: int | None = None

    def files(self, path: Path) -> tuple[Path, ...]:
        """All that is, or may be, written for a path: the file itself first."""
        if self.beside is None:
            return (path,)
        return path, path.with_name(self.beside.format(name=path.name, stem=path.stem))

    def write(self, program: ExportedProgram, path: Path) -> None:
        """Writes a program; formats may put files beside the path, under its stem."""
        self._module().write(program, path)

    def load(self, path: Path, **options: Any) -> Run:
        """What runs a written file; options are those of the format's own ``load``."""
        run: Run = self._module().load(path, **options)
        return run

    def check(self) -> None:
        """Raises a TomeError where the runtime is not installed."""
        for module in self.needs:
            import_extra(module, self.extra, f"--to {self.name}")

    def _module(self) -> Any:
        self.check()
        return importlib.import_module(f"tomepass.formats.{self.module}")


DOORS: dict[str, Door] = {
    door.name: door
    for door in (
        Door("pt2", ".pt2", "pt2", (), None, "torch.export"),
        Door("aoti", ".pt2", "aoti", (), None, "AOTInductor"),
        Door(
            "onnx", ".onnx", "onnx_file", ("onnxscript", "onnxruntime"), "onnx", "ONNX Runtime",
            beside="{name}.data",
        ),
        Door(
            "openvino", ".xml", "openvino_ir", ("openvino",), "openvino", "OpenVINO",
            beside="{stem}.bin",
        ),
        Door(
            "tensorrt", ".pt2", "tensorrt_program", ("torch_tensorrt",), "tensorrt", "TensorRT",
            most=64,
        ),
    )
}  # fmt: skip
"""Every format by its name."""


def door(name: str) -> Door:
    """The format of a name.

    Raises:
        TomeError: if there is none.
    """
    if name not in DOORS:
        raise TomeError(f"unknown format {name!r}; known: {', '.join(DOORS)}")
    return DOORS[name]
