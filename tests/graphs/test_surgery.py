"""Small surgeries on graphs."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tomepass.graphs.surgery import without_places


class _Placed(torch.nn.Module):
    def forward(self, x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        return (x + positions) * table


def test_without_places_one_table_is_zero_and_another_has_its_first_row_everywhere() -> None:
    module = fx.symbolic_trace(_Placed())
    x, positions, table = torch.randn(2, 5, 3), torch.randn(5, 3), torch.randn(2, 5, 1)
    placeless = without_places(module, {"positions": None, "table": -2})
    expected = x * table[:, :1]
    assert torch.equal(placeless(x, positions, table), expected)
    assert torch.equal(module(x, positions, table), (x + positions) * table)
    assert not torch.allclose(expected, (x + positions) * table)
