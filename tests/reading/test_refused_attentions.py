"""Attentions that only look right, each refused for what is wrong with it."""

from __future__ import annotations

import pytest
from encoders import exported, pixels
from near_misses import near_miss

from tomepass import ToMe, TomeError
from tomepass.planning.plan_graph import plan_graph
from tomepass.rewriting.sweep import rewrite

REASONS = {
    "EinsumHeads": "expected keys made from the stream's tokens",
    "OverQueries": "something else than the keys",
    "SharpenedWeights": "aten.pow changes what attention weights sum to",
    "SquaredWeights": "aten.mul changes what attention weights sum to",
    "SubtractedUpdate": "no residual sum",
    "TalkingHeadsWithBias": "after a merge",
}


@pytest.mark.parametrize("name", REASONS)
def test_what_only_looks_like_attention_is_refused(name: str) -> None:
    graph = exported(near_miss(name, readout="dense"), {"pixels": pixels()})
    planned = plan_graph(graph, ToMe(6))
    told = [mismatch.reason for mismatch in planned.mismatches]
    if not told:
        with pytest.raises(TomeError) as caught:
            rewrite(graph, planned)
        told = [caught.value.reason]
    assert any(REASONS[name] in reason for reason in told)
