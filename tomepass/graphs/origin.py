"""Where a node comes from, and what its value is: metadata carried from node to node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import fx

# Where a node comes from.
ORIGIN = ("stack_trace", "nn_module_stack")


# What says to AOTAutograd that a node may be computed again in the backward.
_CHECKPOINTED = ("recompute", "ac_graph_id")


_VALUES = ("val", "example_value")  # ours, and Dynamo's

# Where a line of code is not the model's.
_HOMES = (Path(torch.__file__).parent, Path(__file__).parents[1])
_NOT_THE_MODEL = tuple(f'"{home}/' for home in _HOMES)


def carry_origin(new: fx.Node, like: fx.Node) -> None:
    """Marks a node as coming from where another does: its source line and its module."""
    carried = (*ORIGIN, *_CHECKPOINTED)
    new.meta.update({name: like.meta[name] for name in carried if name in like.meta})


def value_of(node: Any) -> Any:
    """The fake value of a node of a captured graph, or of one of Dynamo's."""
    return node.meta["val"] if "val" in node.meta else node.meta["example_value"]


def carry_value(new: fx.Node, old: fx.Node) -> None:
    """Gives a node the fake value of the one it stands for."""
    new.meta.update({name: old.meta[name] for name in _VALUES if name in old.meta})


def source_line(node: fx.Node) -> str | None:
    """The model's source line behind a node, ``file.py:216: code``, torch's own frames skipped."""
    trace = node.meta.get("stack_trace") or node.meta.get("custom", {}).get("stack_trace")
    if not trace:
        return None
    frames = [line.strip() for line in trace.splitlines() if line.strip()]
    located = [
        (frame, frames[i + 1] if i + 1 < len(frames) else "")
        for i, frame in enumerate(frames)
        if frame.startswith("File ")
    ]
    own = [pair for pair in located if not any(home in pair[0] for home in _NOT_THE_MODEL)]
    frame, code = (own or located)[-1]
    parts = frame.split(", ")
    path = parts[0].removeprefix("File ").strip('"')
    line = parts[1].removeprefix("line ") if len(parts) > 1 else "?"
    if ", code: " in frame:
        code = frame.split(", code: ", 1)[1]
    return f"{'/'.join(path.split('/')[-2:])}:{line}: {code}"
