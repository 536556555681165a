"""What is known of an operator without running it is what running it would say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tomepass.ops.attending.log_size import log_size
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge, merge_size
from tomepass.ops.merging.side import keep
from tomepass.ops.results import RESULTS

ASSIGN = torch.tensor([[0, 1, 1, 2, 0], [0, 1, 2, 2, 2]])
SIZE = torch.ones(2, 5)
CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "odd match": (match, (torch.randn(2, 3, 5, 4), 2, [0])),
    "even match": (match, (torch.randn(2, 3, 6, 4), 2, [])),
    "merge": (merge, (torch.randn(2, 5, 4), None, ASSIGN, 3)),
    "merge in half": (merge, (torch.randn(2, 5, 4).half(), SIZE, ASSIGN, 3)),
    "first sizes": (merge_size, (None, ASSIGN, 3)),
    "sizes": (merge_size, (SIZE, ASSIGN, 3)),
    "kept": (keep, (None, ASSIGN, 3, [0])),
    "log size": (log_size, (SIZE, torch.randn(2, 3, 5, 5))),
    "log size of keys first": (log_size, (SIZE, torch.randn(2, 3, 5, 5), 2)),
    "folded log size": (log_size, (SIZE, torch.randn(6, 5, 5), 2, 3)),
    "shared log size": (log_size, (SIZE[:1], torch.randn(2, 3, 5, 5).half())),
}


def alike(known: Tensor, real: Tensor) -> bool:
    same = (known.shape, known.dtype, known.device) == (real.shape, real.dtype, real.device)
    return same and known.stride() == real.stride()


@pytest.mark.parametrize("name", CALLS)
def test_it_is_what_running_says(name: str) -> None:
    operator, args = CALLS[name]
    assert alike(RESULTS[operator](*args), operator(*args))


def test_each_is_tried() -> None:
    assert {operator for operator, _ in CALLS.values()} == set(RESULTS)
