"""How linear the blocks of a model are: what ToFu prunes or merges by."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from tomepass.capture import Capture
from tomepass.module import read_state
from tomepass.planning import PlannedStream


def block_linearity(
    model: nn.Module, capture: Capture, planned: PlannedStream, call: dict[str, Any]
) -> tuple[float, ...]:
    """How far each block is from linear between tokens that would merge (ToFu, section 3.2).

    For the most similar pairs of neighbours x1, x2 of the residual stream where a block merges,
    and f what the block does from there to its end: the mean length of
    ``f((x1 + x2) / 2) - (f(x1) + f(x2)) / 2`` over that of ``(f(x1) - x1 + f(x2) - x2) / 2``.
    0 is linear: the merged token goes where the mean of both would have gone.

    Args:
        model: the captured model.
        capture: of it.
        planned: one of its streams.
        call: inputs, as keyword inputs of the model.

    Returns:
        a figure a block.
    """
    values = [*read_state(model, capture), *pytree.tree_leaves(call)]
    found = []
    ends = [block.entry for block in planned.stream.blocks[1:]]
    for index, block in enumerate(planned.stream.blocks):
        end = ends[index] if index < len(ends) else _next_sum(block.merge_at)
        if end is None or end is block.merge_at:
            found.append(0.0)
            continue
        (x,) = _run(capture.graph.module, values, {}, [block.merge_at])
        first, second = _neighbours(x)
        results = [
            _run(capture.graph.module, values, {block.merge_at: given}, [end])[0]
            for given in (first, second, (first + second) / 2)
        ]
        ours, theirs = results[2], (results[0] + results[1]) / 2
        update = (theirs - (first + second) / 2).norm(dim=-1)
        found.append(float((ours - theirs).norm(dim=-1).mean() / update.mean()))
    return tuple(found)


def _neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every token, and the other token most similar to it: ``[B, N, C]`` each."""
    direction = torch.nn.functional.normalize(x, dim=-1)
    cosines = direction @ direction.transpose(1, 2)
    cosines.diagonal(dim1=1, dim2=2).fill_(-2.0)
    near = cosines.argmax(-1)
    return x, x.gather(1, near.unsqueeze(-1).expand_as(x))


def _next_sum(node: fx.Node) -> fx.Node | None:
    """The end of the last block: the next value of the stream's shape that sums it with another."""
    shape = node.meta["val"].shape
    for user in sorted(node.users):
        value = user.meta.get("val")
        summed = user.target is torch.ops.aten.add.Tensor
        if summed and isinstance(value, Tensor) and value.shape == shape:
            return user
    return None


def _run(
    module: fx.GraphModule, values: list[Any], given: dict[fx.Node, Tensor], wanted: list[fx.Node]
) -> list[Tensor]:
    """Some nodes of a graph, where others are given instead of worked out."""

    class Runner(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = given[n] if n in given else super().run_node(n)
            if n in wanted:
                kept[n] = result
            return result

    kept: dict[fx.Node, Tensor] = {}
    with torch.no_grad():
        Runner(module).run(*values)
    return [kept[node] for node in wanted]
