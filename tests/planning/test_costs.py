"""What merging saves, before any rewrite; test_zoo.py holds every family to the rewritten graph."""

from __future__ import annotations

import pytest
from encoders import exported, make, pixels

from tomepass import ToMe
from tomepass.counts.blocks import plan_counts
from tomepass.planning.costs import Product, StreamCosts, stream_costs
from tomepass.planning.macs import macs_by_name
from tomepass.planning.plan_graph import plan_graph


def test_a_product_falls_with_each_of_its_token_axes() -> None:
    linear, attention = Product(1000, 0, (10,)), Product(1000, 0, (10, 10))
    assert linear.saved(0) == attention.saved(0) == 0
    assert linear.saved(2) == pytest.approx(200)
    assert attention.saved(2) == pytest.approx(360)


def test_products_count_the_merges_before_them() -> None:
    plan = plan_counts(10, (), (2, 3))  # 10, 8, 5 tokens
    for after, saved in ((0, 0), (1, 200), (2, 500)):
        assert StreamCosts((Product(1000, after, (10,)),)).saved(plan) == pytest.approx(saved)


def test_an_attention_sees_the_tokens_before_its_blocks_merge_and_the_mlp_those_after() -> None:
    graph = exported(make(depth=2), {"pixels": pixels()})
    (stream,) = plan_graph(graph, ToMe(4)).streams
    products = stream_costs(graph, stream, macs_by_name(graph)).products
    square = [p.after for p in products if len(p.lengths) == 2]
    assert square == [0, 1]
    assert {p.after for p in products} == {0, 1, 2}
    assert [p.after for p in products] == sorted(p.after for p in products)
