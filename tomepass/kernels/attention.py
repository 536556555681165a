"""Proportional attention on the fastest exact path of a device: which, where and why.

| device, dtype | path | why |
|---|---|---|
| CPU with AMX, bfloat16 | log(size) as a bias, keys padded to a multiple of 16 | tiles of 16 |
| CUDA | what :mod:`tomepass.attention_gpu` says | flash takes no bias |
| all others | log(size) as a bias | the bias costs the fused kernels next to nothing |

Padded keys get the lowest bias there is: after the softmax they weigh exactly nothing. The figures
behind the table, and the paths that lost, are in docs/benchmarks.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from tomepass.graphs.nodes import FUSED, argument
from tomepass.graphs.origin import carry_origin
from tomepass.ops.library import autocasts, is_overhead

aten = torch.ops.aten

_TILE = 16


def padded_to(device: torch.device, dtype: torch.dtype) -> int:
    """The multiple of keys that fused attention is fastest with; 1 where any number will do.

    Under autocast dtypes are those of one call: what is captured then may run without it.
    """
    narrow = dtype is torch.bfloat16 and not autocasts(device)
    tiles = device.type == "cpu" and narrow and torch.cpu._is_amx_tile_supported()
    return _TILE if tiles else 1


def take_fastest_attention(module: fx.GraphModule, fake_mode: FakeTensorMode) -> tuple[str, ...]:
    """Puts every proportional attention of a rewritten graph on the fastest path, in place.

    Returns:
        a line on each path that was taken.
    """
    taken: dict[str, int] = {}
    for node in module.graph.find_nodes(op="call_function", target=FUSED):
        bias = argument(node, 3, "attn_mask")
        if bias is None or not any(map(is_overhead, (bias, *bias.all_input_nodes))):
            continue
        keys: Tensor = node.args[1].meta["val"]
        multiple = padded_to(keys.device, keys.dtype)
        how = "log(size) as a bias"
        if multiple > 1:
            how += f", keys padded to a multiple of {multiple}"
            _pad(node, bias, -int(keys.shape[-2]) % multiple, fake_mode)
        taken[how] = taken.get(how, 0) + 1
    module.recompile()
    return tuple(f"{n} attention{'s' * (n > 1)}: {how}" for how, n in taken.items())


def _lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min


def _pad(node: fx.Node, bias: fx.Node, missing: int, fake_mode: FakeTensorMode) -> None:
    if not missing:
        return
    lowest = _lowest(bias.meta["val"].dtype)
    args: list[Any] = [*node.args[:3], bias, *node.args[4:]]
    with node.graph.inserting_before(node), fake_mode:
        for place, edges, value in (
            (1, [0, 0, 0, missing], 0.0),
            (2, [0, 0, 0, missing], 0.0),
            (3, [0, missing], lowest),
        ):
            operand: fx.Node = args[place]
            padded = node.graph.call_function(aten.constant_pad_nd.default, (operand, edges, value))
            carry_origin(padded, node)
            padded.meta["val"] = aten.constant_pad_nd.default(operand.meta["val"], edges, value)
            args[place] = padded
    node.args = tuple(args)
    node.kwargs = {name: a for name, a in node.kwargs.items() if name != "attn_mask"}
