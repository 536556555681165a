"""Removes attention masks that hide nothing.

Transformers builds such masks while a model is exported. Fused attention is faster without one.
"""

from __future__ import annotations

import torch
from torch import fx

from tomepass.graphs.constants import constant_value
from tomepass.graphs.nodes import (
    FUSED,
    argument,
)

aten = torch.ops.aten


def hides_nothing(mask: fx.Node) -> bool:
    """Is an attention mask provably all true (or, if it is added, all zero) for every batch?

    Transformers materialises such a mask under ``torch.export``: arange, ge, expand.
    """
    value = constant_value(mask, up_to_broadcast=True)
    if value is None:
        return False
    return bool(value.all()) if value.dtype is torch.bool else not bool(value.any())


def drop_idle_masks(module: fx.GraphModule) -> None:
    """Leaves out boolean masks that are all true and are *added* to an attention's bias.

    Transformers makes them under ``torch.export`` alone. They raise all scores of a row alike,
    which no softmax sees but for its rounding.
    """
    for node in list(module.graph.nodes):
        if node.target is not aten.add.Tensor:
            continue
        for bias, mask in (node.args[:2], node.args[1::-1]):
            if (
                isinstance(mask, fx.Node)
                and mask.meta["val"].dtype is torch.bool
                and hides_nothing(mask)
                and all(_is_mask_of(user, node) for user in node.users)
            ):
                node.replace_all_uses_with(bias)
                module.graph.erase_node(node)
                break


def _is_mask_of(attention: fx.Node, mask: fx.Node) -> bool:
    return attention.target is FUSED and argument(attention, 3, "attn_mask") is mask
