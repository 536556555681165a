"""What merging saves, foretold from the captured graph: exactly what the rewritten graph has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import exported
from zoo import COUNTS, FAMILIES, make_inputs

from tomepass import ToMe
from tomepass.costs import stream_costs
from tomepass.macs import batch_of, is_overhead, macs_by_name, node_macs
from tomepass.planning import plan_graph
from tomepass.rewrite import rewrite


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_macs_of_every_family_are_foretold(name: str, shared_models: Any) -> None:
    captured = exported(shared_models[name], make_inputs(name))
    planned = plan_graph(captured, ToMe(COUNTS))
    macs = macs_by_name(captured)
    saved = [stream_costs(captured, p, macs).saved(p.plan) for p in planned.streams]
    nodes = rewrite(captured, planned).module.graph.nodes
    left = sum(node_macs(n) for n in nodes if not is_overhead(n)) / batch_of(captured)
    assert all(s > 0 for s in saved)
    assert sum(macs.values()) - sum(saved) == pytest.approx(left, rel=1e-9)
