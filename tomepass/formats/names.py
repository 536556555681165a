"""Inputs and outputs of a program by their names, for formats that name them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.export import ExportedProgram

from tomepass.errors import NotExported, TomeError


def output_names(program: ExportedProgram) -> list[str]:
    """``logits``, or ``vision_model_output.pooler_output`` where outputs are nested."""
    spec = program.call_spec.out_spec
    assert spec is not None
    outputs = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    named, _ = pytree.tree_flatten_with_path(outputs)
    return [".".join(map(_step, path)) or "output" for path, _ in named]


def input_shapes(program: ExportedProgram) -> dict[str, list[int]]:
    """The shape of each input of a program, by its name; -1 for a size that is dynamic."""
    users = set(program.graph_signature.user_inputs)
    return {
        node.name: [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]
        for node in program.graph.find_nodes(op="placeholder")
        if node.name in users and isinstance(node.meta.get("val"), Tensor)
    }


def arrays(call: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """The tensors of a call as NumPy arrays, in the order of a file's names for its inputs.

    Raises:
        TomeError: if the call has other inputs than the file.
    """
    leaves, _ = pytree.tree_flatten_with_path(dict(call))
    # As torch.export names them: x_0 is the first of the input x.
    given = {
        re.sub(r"[^a-z0-9]", "_", "_".join(map(_step, path)).lower()): leaf.detach().cpu().numpy()
        for path, leaf in leaves
        if isinstance(leaf, Tensor)
    }
    if set(given) != set(names):
        raise TomeError(f"expected the inputs {', '.join(names)}, got {', '.join(given)}")
    return [given[name] for name in names]


def refuse_bfloat16(program: ExportedProgram, runtime: str) -> None:
    """Raises a TomeError for a program that computes in it: NumPy has no such numbers."""
    nodes = program.graph.find_nodes(op="placeholder")
    if any(getattr(node.meta.get("val"), "dtype", None) is torch.bfloat16 for node in nodes):
        raise NotExported(
            f"the model is in bfloat16, and {runtime} takes no bfloat16 inputs from Python",
            advice="export it in float32: model.float(), or --dtype fp32",
        )


def reason(error: BaseException) -> str:
    """What a library was stopped by, under what it wrapped around it; in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _step(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", key)))
