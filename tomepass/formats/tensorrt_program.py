"""TensorRT engines in a ``torch.export`` archive, by way of torch_tensorrt.

Written from torch_tensorrt 2.13's own source; nothing here has run on a machine that has TensorRT.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from tomepass.errors import NotExported
from tomepass.formats import DOORS
from tomepass.kernels.written_out import FOR_TENSORRT

if TYPE_CHECKING:
    from tomepass.formats import Run


BATCHES = (1, 8, DOORS["tensorrt"].most)
"""The least, the usual and the greatest batch an engine with a dynamic one is tuned for."""


def written_out(program: ExportedProgram) -> ExportedProgram:
    """The program in operators that torch_tensorrt converts with a dynamic batch too."""
    with torch.no_grad():
        written: ExportedProgram = program.run_decompositions(FOR_TENSORRT)
    return written


def compile_program(program: ExportedProgram, **options: Any) -> torch.fx.GraphModule:
    """The program with its operators in TensorRT engines."""
    import torch_tensorrt

    compiled: torch.fx.GraphModule = torch_tensorrt.dynamo.compile(
        written_out(program),
        arg_inputs=(),
        kwarg_inputs=_inputs(program),
        # TF32 keeps ten bits of what is multiplied: tokens would merge otherwise than in float32.
        **{"disable_tf32": True, **options},
    )
    return compiled


def engines(compiled: torch.fx.GraphModule) -> int:
    """How many engines a compiled program calls: one, where every operator converts."""
    return sum(1 for name, _ in compiled.named_children() if name.startswith("_run_on_acc"))


def write(program: ExportedProgram, path: Path) -> None:
    """Builds the engines and packs them.

    Raises:
        TomeError: if there is no CUDA device.
    """
    import torch_tensorrt

    compiled = compile_program(_on_cuda(program))
    # Without arg_inputs it does not read ranges of shapes off kwarg_inputs.
    torch_tensorrt.save(compiled, str(path), arg_inputs=(), kwarg_inputs=_inputs(program))


def load(path: Path) -> Run:
    """The engines in an archive, as a function."""
    import torch_tensorrt

    module = torch_tensorrt.load(str(path)).module()

    def run(call: Mapping[str, Any]) -> list[torch.Tensor]:
        moved = pytree.tree_map(lambda v: v.cuda() if isinstance(v, torch.Tensor) else v, call)
        with torch.no_grad():
            return [value.cpu() for value in pytree.tree_leaves(module(**moved))]

    return run


def _on_cuda(program: ExportedProgram) -> ExportedProgram:
    if not torch.cuda.is_available():
        raise NotExported("TensorRT needs a CUDA device, and there is none")
    return move_to_device_pass(program, "cuda")


def _inputs(program: ExportedProgram) -> dict[str, Any]:
    """Ranges of shapes, by the names of the inputs."""
    import torch_tensorrt

    _, call = program.example_inputs
    users = program.graph_signature.user_inputs
    fakes = {n.name: n.meta["val"] for n in program.graph.find_nodes(op="placeholder")}
    made = []
    for name in users:
        value = fakes[name]
        dynamic = any(not isinstance(size, int) for size in value.shape)
        if not dynamic:
            made.append(torch_tensorrt.Input(list(value.shape), dtype=value.dtype, name=name))
            continue
        least, usual, most = ([batch, *value.shape[1:]] for batch in BATCHES)
        made.append(
            torch_tensorrt.Input(
                min_shape=least, opt_shape=usual, max_shape=most, dtype=value.dtype, name=name
            )
        )
    spec = pytree.tree_structure(dict(call))
    named: dict[str, Any] = pytree.tree_unflatten(made, spec)
    return named
