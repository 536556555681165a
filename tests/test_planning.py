"""Plans: plain integers, made before the graph is touched."""

from __future__ import annotations

import json
from typing import Any

import pytest
from encoders import exported, make, pixels
from hypothesis import given, settings
from hypothesis import strategies as st

from tomepass import ToMe, reference
from tomepass.capture import CanonicalGraph
from tomepass.planning import BlockPlan, Planned, plan_graph


@pytest.fixture(scope="module")
def graph() -> CanonicalGraph:
    """Five blocks, 40 tokens: one of the model's own in front, three behind."""
    return exported(make(depth=5, end=3, readout="mean"), {"pixels": pixels()})


def planned(graph: CanonicalGraph, r: Any, **options: Any) -> list[BlockPlan]:
    """The one stream's plan."""
    (stream,) = plan_graph(graph, ToMe(r, **options)).streams
    return list(stream.plan.blocks)


@pytest.mark.parametrize(
    ("r", "counts"),
    [
        (0, [0, 0, 0, 0, 0]),
        (3, [3, 3, 3, 3, 3]),
        ([3], [3, 0, 0, 0, 0]),
        ([0, 5, 0, 2], [0, 5, 0, 2, 0]),
        ((4, -1), [8, 6, 4, 2, 0]),
        ((4, 1), [0, 2, 4, 6, 8]),
        ((4, 0), [4, 4, 4, 4, 4]),
        ([4, 0], [4, 0, 0, 0, 0]),
        # 36, 18, 9, 5, 3 patches: half of what is not protected, rounded down
        (99, [18, 9, 4, 2, 1]),
    ],
)
def test_a_schedule_becomes_a_count_a_block(
    graph: CanonicalGraph, r: Any, counts: list[int]
) -> None:
    blocks = planned(graph, r)
    assert [b.r for b in blocks] == counts
    tokens = 40
    for index, block in enumerate(blocks):
        assert (block.index, block.tokens_in) == (index, tokens)
        tokens -= block.r
        assert block.tokens_out == tokens


def test_more_counts_than_blocks_are_an_error(graph: CanonicalGraph) -> None:
    with pytest.raises(ValueError, match="6 counts but the model has 5 blocks"):
        plan_graph(graph, ToMe([1] * 6))


@settings(max_examples=60, deadline=None)
@given(
    r=st.lists(st.integers(0, 30), max_size=5),
    protected=st.sets(st.integers(0, 39), max_size=40),
)
def test_the_cap_is_the_references(
    graph: CanonicalGraph, r: list[int], protected: set[int]
) -> None:
    held = tuple(sorted(protected))
    for block in planned(graph, r, protected=held):
        asked = r[block.index] if block.index < len(r) else 0
        assert block.r == reference.merge_count(asked, block.tokens_in, held)
        if block.r:
            held = tuple(range(len(held)))


def test_one_block_takes_every_schedule() -> None:
    graph = exported(make(depth=1), {"pixels": pixels()})
    for r in (4, [4], (4, -1), (4, 1)):
        assert planned(graph, r) == [BlockPlan(0, 37, 4)]


def test_a_plan_is_json(graph: CanonicalGraph) -> None:
    (stream,) = plan_graph(graph, ToMe([3, 0, 2])).streams
    data = json.loads(json.dumps(stream.plan.to_dict()))
    assert data["tokens"] == 40
    assert data["protected"] == [0, 37, 38, 39]
    assert data["blocks"][:2] == [
        {"index": 0, "tokens_in": 40, "r": 3},
        {"index": 1, "tokens_in": 37, "r": 0},
    ]


def test_planning_leaves_the_graph_alone(graph: CanonicalGraph) -> None:
    before = graph.module.print_readable(print_output=False)
    first, second = (plan_graph(graph, ToMe(4)) for _ in range(2))
    assert graph.module.print_readable(print_output=False) == before
    assert [s.plan for s in first.streams] == [s.plan for s in second.streams]


def test_a_plan_knows_where_merging_is_still_to_come(graph: CanonicalGraph) -> None:
    found: Planned = plan_graph(graph, ToMe(4))
    (stream,) = found.streams
    blocks = stream.stream.blocks
    assert {b.entry for b in blocks} <= stream.inner
    assert {b.merge_at for b in blocks[:-1]} <= stream.inner
    assert blocks[-1].merge_at not in stream.inner
