"""Graphs of small functions, in the dialect that the pass reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)


def capture(
    function: Callable[..., Any], *inputs: Tensor, dynamic: tuple[int, ...] = ()
) -> fx.GraphModule:
    """The pre-dispatch graph of a function; sizes ``dynamic`` of the first input are symbols."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for number, value in enumerate(inputs):
        sizes = [DimDynamic.STATIC] * value.ndim
        for dim in dynamic if number == 0 else ():
            sizes[dim] = DimDynamic.DYNAMIC
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        fakes.append(mode.from_tensor(value, symbolic_context=context))
    with mode:
        return make_fx(function, pre_dispatch=True)(*fakes)
