"""Plans: plain integers, made before the graph is touched."""

from __future__ import annotations

import json
from typing import Any

import pytest
from encoders import exported, make, pixels
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from zoo import make_inputs

from tomepass import ToMe, TomeError, reference
from tomepass.counts.blocks import BlockPlan, plan_counts
from tomepass.graphs.canonical import CanonicalGraph
from tomepass.planning.costs import stream_costs
from tomepass.planning.macs import macs_by_name
from tomepass.planning.plan_graph import plan_graph
from tomepass.planning.streams import Planned


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


@examples(60)
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


# ---- token counts that hardware takes --------------------------------------------------------


@pytest.mark.parametrize(
    ("r", "multiple", "left"),
    [
        # Without: 181 165 149 133 117 101 85 69 53 37 21 11.
        # Of 32 tokens, one of them protected, no more than 15 can merge.
        (16, 16, [176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 17, 11]),
        (16, 8, [176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 17, 9]),
        # Without: 189 181 173 165 157 149 141 133 125 117 109 101.
        (8, 16, [176, 176, 160, 160, 144, 144, 128, 128, 112, 112, 96, 96]),
        (8, 8, [184, 176, 168, 160, 152, 144, 136, 128, 120, 112, 104, 96]),
        ([0, 5], 16, [197, 192, *[192] * 10]),
        (0, 16, [197] * 12),
    ],
)
def test_counts_are_rounded_down_once_something_has_merged(
    r: Any, multiple: int, left: list[int]
) -> None:
    counts = ToMe(r).counts(12)
    plan = plan_counts(197, (0,), counts, multiple)
    assert [b.tokens_out for b in plan.blocks] == left


@given(
    tokens=st.integers(3, 300),
    held=st.integers(0, 3),
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    multiple=st.sampled_from([2, 8, 16]),
)
def test_rounding_never_leaves_more_tokens(
    tokens: int, held: int, counts: list[int], multiple: int
) -> None:
    protected = tuple(range(min(held, tokens)))
    plain = plan_counts(tokens, protected, tuple(counts))
    rounded = plan_counts(tokens, protected, tuple(counts), multiple)
    for ours, exact in zip(rounded.blocks, plain.blocks, strict=True):
        assert ours.tokens_out <= exact.tokens_out
        assert exact.tokens_out - ours.tokens_out < multiple


# ---- targets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [{"macs": 0.6}, {"speedup": 1.3}, {"macs": 1}, {"macs": 0.4}])
def test_a_target_is_reached_with_the_fewest_merges(
    graph: CanonicalGraph, target: dict[str, float]
) -> None:
    share = ToMe(**target).schedule.macs
    assert share is not None
    assert macs_left(graph, ToMe(**target)) <= share
    (stream,) = plan_graph(graph, ToMe(**target)).streams
    counts = [block.r for block in stream.plan.blocks]
    if not any(counts):
        assert share == 1
        return
    # One merge less would be too few.
    last = max(i for i, count in enumerate(counts) if count == max(counts))
    counts[last] -= 1
    assert macs_left(graph, ToMe(counts)) > share


def macs_left(graph: CanonicalGraph, method: ToMe) -> float:
    macs = macs_by_name(graph)
    streams = plan_graph(graph, method).streams
    saved = sum(stream_costs(graph, p, macs).saved(p.plan) for p in streams)
    return 1 - saved / sum(macs.values())


def test_a_target_out_of_reach_is_an_error_that_says_what_can_be_reached(
    graph: CanonicalGraph,
) -> None:
    with pytest.raises(TomeError, match=r"macs=0.01 cannot be reached.*leaves 0\.\d+") as caught:
        plan_graph(graph, ToMe(macs=0.01))
    reachable = float(str(caught.value.advice).split("macs=")[1].split(" ")[0])
    assert macs_left(graph, ToMe(macs=reachable)) <= reachable


@pytest.mark.deep
def test_two_streams_share_a_target(shared_models: Any) -> None:
    captured = exported(shared_models["siglip"], make_inputs("siglip"))
    assert macs_left(captured, ToMe(macs=0.8)) <= 0.8
