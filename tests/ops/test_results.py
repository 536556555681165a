"""What is known of an operator without running it is what running it would say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tomepass.ops.results import RESULTS

LINEAR, NORM = torch.ops.aten.linear.default, torch.ops.aten.layer_norm.default
X = torch.randn(2, 5, 6)
LAYOUTS = {
    "contiguous": X,
    "turned": X.transpose(0, 1),
    "cut": torch.randn(2, 9, 6)[:, 2:7],
    "two dimensions": X[0],
    "four dimensions": X[:, None],
    "double": X.double(),
}


def alike(known: Tensor, real: Tensor) -> bool:
    same = (known.shape, known.dtype, known.device) == (real.shape, real.dtype, real.device)
    return same and known.stride() == real.stride()


@pytest.mark.parametrize("x", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_and_norms(x: Tensor, bias: bool) -> None:
    weight, b = torch.randn(4, 6).to(x.dtype), torch.randn(4).to(x.dtype) if bias else None
    assert alike(RESULTS[LINEAR](x, weight, b), LINEAR(x, weight, b))
    scale = torch.randn(6).to(x.dtype) if bias else None
    arguments: tuple[Any, ...] = (x, [6], scale, None, 1e-5)
    assert alike(RESULTS[NORM](*arguments), NORM(*arguments))


@pytest.mark.parametrize("x", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_vector_leaves_no_dimension(x: Tensor) -> None:
    weight = torch.randn(6).to(x.dtype)
    assert alike(RESULTS[LINEAR](x, weight), LINEAR(x, weight))


@pytest.mark.parametrize("operator", [LINEAR, NORM])
def test_what_does_not_fit_fails_as_the_operator_does(operator: Any) -> None:
    other = torch.randn(4, 7) if operator is LINEAR else [7]
    with pytest.raises(RuntimeError):
        RESULTS[operator](X, other)


def test_autocast_decides_the_dtype() -> None:
    weight = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert RESULTS[LINEAR](X, weight).dtype == LINEAR(X, weight).dtype == torch.bfloat16
