"""Methods compiled: what each adds to a graph, several of them in one graph.

One block of a small encoder has all that a method reads of a block. `test_every_method.py` compiles
whole models, which takes half a minute each (`deep`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from depth import at_hand
from encoders import make, pixels
from table import ROWS
from torch import Tensor, nn
from zoo import relative_error

import tomepass
from tomepass import TomeBackend
from tomepass.methods import Method

pytestmark = pytest.mark.usefixtures("captured_once")

# A compiler takes ten seconds and more for what a method adds. All of them are
# compiled in whole models (deep), and written out below.
KINDS = ["threshold"]
# These say something of each of three blocks.
BY_BLOCK = ["tofu_measured", "diffrate_shares"]
WRITTEN_OUT = [name for name in ROWS if name not in BY_BLOCK]
MODEL = make(width=32, depth=3, readout="dense")
BLOCK = make(width=32, depth=1, readout="dense")


def made(name: str, *counts: int) -> Method:
    method: Method = ROWS[name].make(list(counts))
    return method


class Together(nn.Module):
    """Several merged models of the same images, whose common beginning is computed once."""

    def __init__(self, merged: dict[str, nn.Module]) -> None:
        super().__init__()
        self.merged = nn.ModuleDict(merged)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {name: model(x) for name, model in self.merged.items()}


def together(names: list[str], backend: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """For each method what is compiled, what is eager, and what nothing merged gives."""
    x = pixels(3)
    with torch.no_grad():
        merged = Together({n: tomepass.apply(BLOCK, made(n, 9), example_inputs=x) for n in names})
        compiled = torch.compile(merged, fullgraph=True, backend=backend)(x)
        eager, plain = merged(x), BLOCK(x)
    return {name: (compiled[name], eager[name], plain) for name in names}


@pytest.fixture(scope="module")
def generated() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By Inductor, all in one graph."""
    return together(KINDS, "inductor")


@pytest.mark.xdist_group("generated code")
@pytest.mark.parametrize("name", KINDS)
def test_generated_code_computes_what_eager_does(name: str, generated: Any) -> None:
    compiled, eager, plain = generated[name]
    assert relative_error(compiled, eager) < 1e-4
    assert relative_error(eager, plain) > 1e-3


@pytest.fixture(scope="module")
def traced() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Through AOTAutograd, which writes composites out, all in one graph."""
    return together(WRITTEN_OUT, "aot_eager")


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_written_out_it_computes_what_eager_does(name: str, traced: Any) -> None:
    compiled, eager, plain = traced[name]
    assert relative_error(compiled, eager) < 1e-4
    assert relative_error(eager, plain) > 1e-3


@pytest.mark.parametrize("name", at_hand(ROWS, ["pitome", "threshold", "kmeans", "avit"]))
@torch.no_grad()
def test_both_doors_decide_the_same(name: str) -> None:
    x, method = pixels(3), made(name, 9, 4, 0)
    eager = tomepass.apply(MODEL, method, example_inputs=x)(x)
    # Read and rewritten a second time: what it decides is the same.
    backend = TomeBackend(method, inner="eager")
    assert torch.equal(torch.compile(MODEL, backend=backend)(x), eager)
