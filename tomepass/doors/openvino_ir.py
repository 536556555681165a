"""OpenVINO's intermediate representation: ``NAME.xml`` with its weights in ``NAME.bin``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from tomepass.doors.names import flat, input_shapes, output_names

if TYPE_CHECKING:
    from tomepass.doors import Run


def convert(program: ExportedProgram) -> Any:
    """A program as an ``openvino.Model`` with the program's own shapes and names."""
    import openvino

    model = openvino.convert_model(program)
    # Its converter leaves sizes open that the program fixes.
    shapes = input_shapes(program).values()
    model.reshape(dict(enumerate(openvino.PartialShape(shape) for shape in shapes)))
    for output, name in zip(model.outputs, output_names(program), strict=True):
        output.get_tensor().set_names({name})
    return model


def write(program: ExportedProgram, path: Path) -> None:
    """Writes both files, weights as they are."""
    import openvino

    openvino.save_model(convert(program), path, compress_to_fp16=False)


def load(path: Path, precision: str | None = "f32", **options: Any) -> Run:
    """The model compiled for the CPU, as a function.

    Args:
        precision: what it computes in; None leaves it to OpenVINO: bfloat16 where the processor
            has matrix units for it.
        options: of ``Core.compile_model``.
    """
    import openvino

    hints = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), **options}
    if precision is not None:
        hints["INFERENCE_PRECISION_HINT"] = precision
    compiled = openvino.Core().compile_model(path, "CPU", hints)

    def run(call: Mapping[str, Any]) -> list[torch.Tensor]:
        found = compiled([value.detach().numpy() for value in flat(call)])
        return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]

    return run
