"""Which tokens go to each index, counted on the GPU: what merging kernels read."""

from __future__ import annotations

import torch
from torch import Tensor

from tomepass.kernels.given import (
    check_left,
    lengths_of,
)
from tomepass.kernels.gpu.device import need_triton, power
from tomepass.kernels.gpu.tuning import Configuration, run_fastest
from tomepass.ops.library import register_differentiable

INDEX, PLACE = (torch.int64,), (torch.int32,)


def _sources_result(assign: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    lengths_of("sources_triton", "assign", assign, 2, INDEX)
    check_left("sources_triton", tokens)
    return (
        assign.new_empty(assign.shape, dtype=torch.int32),
        assign.new_empty((assign.shape[0], tokens + 1), dtype=torch.int32),
    )


@register_differentiable(
    "sources_triton(Tensor assign, SymInt tokens) -> (Tensor, Tensor)", _sources_result
)
def sources_triton(assign: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """An index map the other way round, for sums in a fixed order.

    Args:
        assign: ``[B, N]`` int64; what is no index below ``tokens`` is sent nowhere.
        tokens: N', places there are.

    Returns:
        ``[B, N]`` int32, the tokens by the place they are sent to, then by position; and
        ``[B, N' + 1]`` int32, where each place's begin.
    """
    from tomepass.kernels.gpu.triton_merge import sources_kernel

    order, start = _sources_result(assign, tokens)
    need_triton(assign)
    assign = assign.contiguous()
    batch, before = assign.shape
    most = max(before, tokens + 1)

    def run(configuration: Configuration) -> None:
        sources_kernel[(batch * -(-most // configuration.block),)](
            *(assign, order, start, before, tokens),
            BLOCK=configuration.block,
            CHUNK=configuration.across,
            **configuration.launch,
        )

    blocks = [Configuration(rows, across) for rows, across in ((32, 64), (64, 64), (32, 128))]
    run_fastest(("sources", power(most)), blocks, run, assign.device)
    return order, start
