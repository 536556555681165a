"""Whoever reads attention weights sees the model's own, fused or written out.

A fused attention does not give its weights away: they are computed again, and must count all that
it does, scale, mask, position bias and the tokens' sizes. Where the same model writes its attention
out, they are read off its softmax. Both must choose alike, family by family.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from depth import at_hand
from lossless import LOSSLESS, errors
from table import OPTIONS, ROWS
from torch import Tensor
from zoo import COUNTS, FAMILIES, make_inputs, make_model

import tomepass
from tomepass.graphs.nodes import FUSED
from tomepass.methods import Method
from tomepass.ops.attending.attention_to import attention_to
from tomepass.planning.plan_graph import plan_graph
from tomepass.rewriting.reducing import Reducing
from tomepass.rewriting.sweep import rewrite

READERS = {
    name: row
    for name, row in (ROWS | OPTIONS).items()
    if name.startswith(("prune", "evit", "spvit", "diffrate", "ats", "tome_importance"))
    and not name.endswith(("norm", "random"))
}
"""The methods that read attention weights, as the test below makes sure."""

# One of each way to read them: what one token pays, what all pay, drawn from, ordered by.
SAMPLE = ("prune", "prune_received", "ats", "tome_importance")
# Plain, with a position bias, turned.
QUICK = ("vit", "beit", "dinov3")
# Written out already; in several parts, each with a say; refused where its mask is one of floats.
OTHERS = ("vit_eager", "llava", "bert_padded")


@pytest.mark.deep
@pytest.mark.parametrize("name", ROWS | OPTIONS)
def test_the_readers_are_told_apart(
    name: str, shared_models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def asking(block: Reducing, queries: list[int]) -> Any:
        asked.append(queries)
        return real(block, queries)

    real = Reducing.attention_to
    monkeypatch.setattr(Reducing, "attention_to", asking)
    model, inputs = shared_models["vit"], make_inputs("vit")
    graph = tomepass.apply(model, r=0, example_inputs=inputs).captured(inputs).capture.graph
    rewrite(graph, plan_graph(graph, (ROWS | OPTIONS)[name].make(COUNTS)))
    assert bool(asked) == (name in READERS)


@contextmanager
def written_out(model: Any) -> Iterator[None]:
    """The same model with its attention spelt as product, softmax, product."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def assert_chosen_alike(model: Any, inputs: dict[str, Any], methods: list[Method]) -> None:
    """Methods see the same weights in both spellings of a model."""
    plain = model(**inputs)
    fused = [tomepass.apply(model, method, example_inputs=inputs) for method in methods]
    graph = fused[0].captured(inputs).graph
    assert graph is not None
    targets = {node.target for node in graph.graph.nodes}
    assert {FUSED, attention_to} & targets, "it is not fused to begin with"
    outputs = [merged(**inputs) for merged in fused]
    with written_out(model):
        for method, ours in zip(methods, outputs, strict=True):
            theirs = tomepass.apply(model, method, example_inputs=inputs)(**inputs)
            found = max(errors(ours, _like(theirs, ours)))
            assert found < LOSSLESS, f"{method!r}: {found}"
            assert max(errors(ours, plain)) > 1e-3, f"{method!r} changes nothing"


def _like(outputs: Any, template: Any) -> Any:
    """Without what only an attention written out returns: its weights."""
    if isinstance(outputs, Tensor):
        return outputs
    return {name: outputs[name] for name in template}


def methods_for(family: str, names: Iterable[str]) -> list[Method]:
    """Methods that take many tokens, so that sizes weigh, where there are many."""
    counts = [20, 0, 12] if FAMILIES[family].streams[0].tokens > 60 else COUNTS
    return [(ROWS | OPTIONS)[name].make(counts) for name in names]


@pytest.mark.parametrize("name", at_hand(QUICK, ["vit"]))
def test_fused_and_written_out_choose_alike(name: str, shared_models: Any) -> None:
    methods = methods_for(name, SAMPLE if name == "vit" else SAMPLE[:2])
    assert_chosen_alike(shared_models[name], make_inputs(name), methods)


@pytest.mark.deep
@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in OTHERS])
def test_every_reader_chooses_alike_in_every_family(name: str) -> None:
    assert_chosen_alike(make_model(name), make_inputs(name, batch=3), methods_for(name, READERS))
