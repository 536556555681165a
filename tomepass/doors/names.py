"""Names of a program's inputs and outputs, for formats that name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor
from torch.export import ExportedProgram


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


def flat(call: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of a call, in the order in which programs take them."""
    return [leaf for leaf in pytree.tree_leaves(dict(call)) if isinstance(leaf, Tensor)]


def _step(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", key)))
