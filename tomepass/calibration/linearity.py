"""How linear the blocks of a model are: what ToFu prunes or merges by."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from tomepass.capture.captured import Capture, read_state
from tomepass.planning.streams import PlannedStream


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
    blocks = planned.stream.blocks
    ends = [*(block.entry for block in blocks[1:]), _next_sum(blocks[-1].merge_at)]
    stream = _run(capture.graph.module, values, {}, [block.merge_at for block in blocks])
    found = []
    for block, end in zip(blocks, ends, strict=True):
        if end is None or end is block.merge_at:  # it ends where it merges
            found.append(0.0)
            continue
        pair = _neighbours(stream[block.merge_at])
        middle = (pair[0] + pair[1]) / 2
        of_first, of_second, of_middle = (
            _run(capture.graph.module, values, {block.merge_at: x}, [end])[end]
            for x in (*pair, middle)
        )
        mean = (of_first + of_second) / 2
        gone = (of_middle - mean).norm(dim=-1).mean()
        found.append(float(gone / (mean - middle).norm(dim=-1).mean()))
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
) -> dict[fx.Node, Tensor]:
    """Some nodes of a graph, where others are given instead of worked out."""
    needed: set[fx.Node] = set()
    waiting = list(wanted)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += [] if node in given else node.all_input_nodes
    known: dict[fx.Node, Any] = dict(given)
    runner = fx.Interpreter(module)
    inputs = iter(values)
    with torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(inputs)
            elif node in needed and node not in given:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = getattr(runner, node.op)(node.target, args, kwargs)
    return {node: known[node] for node in wanted}
