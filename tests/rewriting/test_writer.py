"""What is written into a graph is compared with the plan."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from tomepass import TomeError
from tomepass.reading.axis import Axis
from tomepass.reading.layouts import Layout
from tomepass.rewriting.writer import Writer

TOKENS = tuple(range(9))


def value(*shape: int) -> tuple[Writer, fx.Node]:
    mode = FakeTensorMode()
    with mode:
        fake = torch.empty(shape)
    node = fx.Graph().placeholder("x")
    node.meta["val"] = fake
    return Writer(mode), node


@pytest.mark.parametrize(
    ("shape", "layout", "length"),
    [
        ((2, 7, 4), Layout(Axis(1), Axis(0), TOKENS), 7),
        ((2, 21, 4), Layout(Axis(1, 3), Axis(0), TOKENS), 7),
        ((2, 3, 7, 7), Layout(Axis(2), Axis(0), TOKENS, Axis(3)), 7),
    ],
)
def test_a_length_that_is_not_the_plan_s_is_refused(
    shape: tuple[int, ...], layout: Layout, length: int
) -> None:
    writer, node = value(*shape)
    writer.block = 2
    writer.compare(node, node, layout, length)
    with pytest.raises(TomeError, match=f"expected {length - 1} tokens on dimension") as caught:
        writer.compare(node, node, layout, length - 1)
    assert (caught.value.block, caught.value.node) == (2, "x")


def test_each_token_axis_is_compared() -> None:
    writer, node = value(2, 3, 7, 6)
    with pytest.raises(TomeError, match="expected 7 tokens on dimension 3"):
        writer.compare(node, node, Layout(Axis(2), Axis(0), TOKENS, Axis(3)), 7)
