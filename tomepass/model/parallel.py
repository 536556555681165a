"""Models spread over processes: which of them no graph can hold, and what to do instead."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from tomepass.errors import NotCaptured, TomeError

_BEFORE = (
    "merge first and shard what comes of it, as a whole: fully_shard(tomepass.apply(model, ...)); "
    "or shard the model as a whole, fully_shard(model), and compile it: "
    "torch.compile(model, backend=TomeBackend(...))"
)


def refuse_sharded(model: nn.Module) -> None:
    """Raises a TomeError for a model whose parameters are spread over processes."""
    if (how := _sharded(model)) is not None:
        raise NotCaptured(
            f"{type(model).__name__} is sharded by {how}: its parameters are held in pieces, and "
            "gathered by code around its modules that no graph holds",
            advice=_BEFORE,
        )


def sharded_inside(model: Any) -> TomeError | None:
    """Why a compiled model comes in pieces: parts of it are sharded one by one."""
    if not isinstance(model, nn.Module):
        return None
    # A model sharded as a whole is gathered before it is called, and comes in one piece.
    parts = [how for part in model.children() if (how := _sharded(part)) is not None]
    if not parts:
        return None
    return NotCaptured(
        f"parts of {type(model).__name__} are sharded one by one by {parts[0]}, which gathers "
        "their parameters between graphs: no graph holds more than one of them, and tokens merged "
        "in one would be unmerged at its end",
        advice=_BEFORE,
    )


def _sharded(model: nn.Module) -> str | None:
    """How a model is spread over processes; None if it is not."""
    # What was never imported shards nothing.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    tensor: Any = sys.modules.get("torch.distributed.tensor")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            return "fully_shard (FSDP2)"
        if isinstance(module, fsdp.FullyShardedDataParallel):
            return "FullyShardedDataParallel"
    for parameter in model.parameters() if tensor is not None else ():
        if isinstance(parameter, tensor.DTensor):
            return "distributed tensors (DTensor)"
    return None
