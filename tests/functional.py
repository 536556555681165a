"""Blocks as functions, traced in milliseconds: enough to read a graph, plan it and rewrite it.

    graph = captured(lambda x, valid, weight: block(x, weight)[:, 0])

Images are ``[2, 12, 8]`` tokens already; ``valid`` says which are no padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tomepass.graphs.canonical import CanonicalGraph

IMAGES, VALID = torch.randn(2, 12, 8), torch.ones(2, 12, dtype=torch.bool)
WEIGHT = torch.randn(8, 8)


def captured(function: Callable[..., Any]) -> CanonicalGraph:
    """A function of images, valid tokens and a weight, as a canonical graph."""
    module = make_fx(function, tracing_mode="fake", pre_dispatch=True)(IMAGES, VALID, WEIGHT)
    names = [n.name for n in module.graph.find_nodes(op="placeholder")]
    return CanonicalGraph(module, frozenset(names[:2]), False, frozenset(names[2:]))


def residual(x: Tensor, layers: int) -> Tensor:
    for _ in range(layers):
        x = x + torch.tanh(x * 1.1)
    return x


def block(x: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    y = F.layer_norm(x, (8,))
    q, k, v = (F.linear(y, weight * i).view(2, -1, 2, 4).transpose(1, 2) for i in (1, 2, 3))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(x.shape)
    x = x + y
    return x + F.linear(F.layer_norm(x, (8,)), weight)
