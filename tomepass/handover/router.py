"""Measures how redundant the tokens of each image are; adaptive merging chooses a budget by it.

Redundancy is the mean, over tokens, of the cosine with the most similar other token, where tokens
enter the first block.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from tomepass.capture.captured import Capture, read_state
from tomepass.graphs.surgery import only_outputs
from tomepass.methods import ToMe
from tomepass.ops.padding import PADDED, padded_size
from tomepass.planning.plan_graph import plan_graph


def redundancy(x: Tensor, protected: tuple[int, ...], size: Tensor | None = None) -> Tensor:
    """How alike the tokens of an image are: the mean cosine with the most similar other token.

    Args:
        x: ``[B, N, C]``, as they enter the first block.
        protected: positions that do not count.
        size: ``[B, N]``, given where some tokens are padding, which does not count either.

    Returns:
        ``[B]`` float32.
    """
    free = [i for i in range(x.shape[1]) if i not in set(protected)]
    metric = torch.nn.functional.normalize(x[:, free].float(), dim=-1)
    cosines = metric @ metric.transpose(1, 2)
    alone = torch.eye(len(free), dtype=torch.bool, device=x.device)
    if size is None:
        return cosines.masked_fill(alone, -1.0).amax(-1).mean(-1)
    seen = size[:, free] >= PADDED
    nearest = cosines.masked_fill(alone | ~seen.unsqueeze(1), -1.0).amax(-1)
    return torch.where(seen, nearest, 0.0).sum(-1) / seen.sum(-1).clamp(min=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Router:
    """Works out the tokens that enter the first block, and how alike they are.

    Args:
        graph: the part of the captured graph that makes the tokens.
        protected: positions of tokens that do not count.
        padded: whether the graph also tells which tokens are padding.
    """

    graph: fx.GraphModule
    protected: tuple[int, ...]
    padded: bool = False

    @classmethod
    def of(cls, capture: Capture) -> Router:
        """Of a captured model that can be merged."""
        stream = plan_graph(capture.graph, ToMe(0)).streams[0]
        read = [stream.stream.entry, *filter(None, [stream.padding])]
        graph = only_outputs(capture.graph.module, [node.name for node in read])
        return cls(graph, stream.plan.protected, stream.padding is not None)

    def __call__(self, model: nn.Module, capture: Capture, call: dict[str, Any]) -> Tensor:
        """How redundant each image is, ``[B]`` float32, with the model's parameters as they are."""
        values = [*read_state(model, capture), *pytree.tree_leaves(call)]
        with torch.no_grad():
            x, *mask = self.graph(*values)
            size = padded_size(_of_heads(mask[0]), x) if self.padded else None
            return redundancy(x, self.protected, size)


def _of_heads(mask: Tensor) -> Tensor:
    """A mask as attention takes it, heads and all."""
    return mask.unsqueeze(1) if mask.ndim == 3 else mask
