"""OpenVINO's intermediate representation: ``NAME.xml`` with its weights in ``NAME.bin``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from tomepass.formats.names import arrays, input_shapes, output_names, refuse_bfloat16

if TYPE_CHECKING:
    from tomepass.formats import Run


def convert(program: ExportedProgram) -> Any:
    """A program as an ``openvino.Model`` with the program's own shapes and names."""
    import openvino

    model = openvino.convert_model(program)
    # Its converter leaves sizes open that the program fixes.
    shapes = input_shapes(program)
    model.reshape(dict(enumerate(openvino.PartialShape(shape) for shape in shapes.values())))
    for put, name in zip(model.inputs, shapes, strict=True):
        put.get_tensor().set_names({name})
    for output, name in zip(model.outputs, output_names(program), strict=True):
        output.get_tensor().set_names({name})
    return model


def token_products(model: Any) -> list[str]:
    """The names of products of two activations: which tokens are alike, and their merging.

    In int8 they would choose other tokens and weigh them wrongly, and they cost next to nothing:
    leave them out, ``nncf.quantize(..., ignored_scope=nncf.IgnoredScope(names=...))``. Attention
    is an operator of its own here and none of them.
    """
    return [
        node.get_friendly_name()
        for node in model.get_ops()
        if node.get_type_name() == "MatMul"
        and not any(_constant(node.input_value(place).get_node()) for place in (0, 1))
    ]


def _constant(node: Any) -> bool:
    """Is it a weight, perhaps converted or transposed?"""
    inputs = node.input_values()
    if not inputs:
        return bool(node.get_type_name() == "Constant")
    return all(_constant(value.get_node()) for value in inputs)


def write(program: ExportedProgram, path: Path) -> None:
    """Writes both files, weights as they are.

    Raises:
        TomeError: if the model is in bfloat16.
    """
    import openvino

    refuse_bfloat16(program, "OpenVINO")
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
    names = [put.get_any_name() for put in compiled.inputs]

    def run(call: Mapping[str, Any]) -> list[torch.Tensor]:
        found = compiled(arrays(call, names))
        return [torch.from_numpy(found[output].copy()) for output in compiled.outputs]

    return run
