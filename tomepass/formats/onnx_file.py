"""ONNX files, run by ONNX Runtime; the standard operators alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram

from tomepass.errors import NotExported
from tomepass.formats.names import arrays, output_names, reason, refuse_bfloat16

if TYPE_CHECKING:
    from tomepass.formats import Run


OPSET = 20
"""Of the standard operators: the first with Gelu as one."""


# Protocol buffers hold no more than 2 GiB: beyond it, weights go into a file beside.
_LARGEST = 1 << 30


def write(program: ExportedProgram, path: Path) -> None:
    """Writes an ONNX file, its weights in it or, where they are many, in ``NAME.data`` beside it.

    Raises:
        TomeError: if an operator has no translation, or the model is in bfloat16.
    """
    refuse_bfloat16(program, "ONNX Runtime")
    names = output_names(program)
    try:
        made = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, output_names=names, verbose=False
        )
    except Exception as error:  # the exporter wraps what it raises in classes of its own
        raise NotExported(
            f"torch.onnx.export failed: {reason(error)}",
            advice="torch.onnx.export(tomepass.export(model), dynamo=True) shows the whole error",
        ) from error
    assert made is not None
    weights = sum(value.nbytes for value in program.state_dict.values())
    made.save(str(path), external_data=weights > _LARGEST)


def load(path: Path) -> Run:
    """The file on ONNX Runtime's CPU provider, as a function."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [put.name for put in session.get_inputs()]

    def run(call: Mapping[str, Any]) -> list[torch.Tensor]:
        given = dict(zip(names, arrays(call, names), strict=True))
        return [torch.from_numpy(value) for value in session.run(None, given)]

    return run
