"""What must hold of every method: identity, plain reference, compiled, batches, MACs."""

from __future__ import annotations

from typing import Any

import plain
import pytest
import torch
from depth import at_hand, in_turn
from families import PARTS
from lossless import assert_macs_are_foretold
from table import OPTIONS, ROWS, R
from torch.utils._pytree import tree_leaves
from zoo import make_inputs, make_model, output_of, relative_error

import tomepass
from tomepass import TomeBackend
from tomepass.capture.captured import Capture, read_state
from tomepass.capture.exported import capture_module
from tomepass.handover.applied import make_applied
from tomepass.methods import DiffRate, EViT, Method, SPViT, ToFu, method_from_dict
from tomepass.planning.plan_graph import plan_graph
from tomepass.proof.duplicates import check_duplicates
from tomepass.rewriting.sweep import rewrite

every_method = pytest.mark.parametrize("name", ROWS)
LOST = 1e-5  # of logits: more is no rounding


ALL = {**ROWS, **OPTIONS}
WHOLE = [name for name in ROWS if "_" not in name]  # one of each method, with no option
# Every method on one of the families, and each of these with as many; the other pairs are deep.
one_each = pytest.mark.parametrize(("family", "name"), in_turn(PARTS, ROWS))


def made(name: str, r: Any = None, **fields: Any) -> Method:
    return ALL[name].make(R if r is None else r, **fields)


def expected(family: str, model: Any, inputs: Any, method: Method, name: str) -> torch.Tensor:
    """What the plain reference makes of a model."""
    parts = PARTS[family](model, inputs)
    plan = method.plan(parts.embedded.shape[1], tuple(range(parts.protected)), len(parts.blocks))
    left = [block.tokens_out for block in plan.blocks]
    encoded = plain.encode(
        *(parts.embedded, parts.blocks, parts.norm, left, parts.protected),
        rule=ALL[name].rule,
        prop_attn=method.prop_attn,
        every_block=method.every_block,
    )
    size = encoded.size if method.prop_attn else (encoded.size > 0).float()
    if family == "dinov2_registers":  # a mean counts original tokens whatever attention does
        size = encoded.size
    return parts.head(encoded.hidden, size, encoded.source)


@one_each
@torch.no_grad()
def test_merged_is_the_plain_reference(family: str, name: str, shared_models: Any) -> None:
    assert_is_the_reference(family, name, shared_models[family], made(name))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("vit", name) for name in OPTIONS),
        ("dinov2_registers", "tome_queries"),
        ("siglip_vision", "tome_values"),
        ("ast", "tome_importance"),
    ],
)
@torch.no_grad()
def test_options_are_the_plain_reference(family: str, name: str, shared_models: Any) -> None:
    assert_is_the_reference(family, name, shared_models[family], made(name))


@torch.no_grad()
def test_kth_loses_more_than_half(shared_models: Any) -> None:
    assert_is_the_reference("vit", "kth", shared_models["vit"], made("kth", [40, 0, 9]))


def assert_is_the_reference(family: str, name: str, model: Any, method: Method) -> None:
    inputs = make_inputs(family, 3)
    merged = tomepass.apply(model, method, example_inputs=inputs)
    ours = output_of(family, merged(**inputs))
    theirs = expected(family, model, inputs, method, name)
    assert relative_error(ours, theirs) < 1e-4
    assert relative_error(ours, output_of(family, model(**inputs))) > 1e-3


@one_each
@torch.no_grad()
def test_nothing_reduced_is_the_original_bit_for_bit(
    family: str, name: str, shared_models: Any
) -> None:
    model, inputs = shared_models[family], make_inputs(family)
    for method in (made(name, 0), made(name, 0).replace(keep_rate=1.0)):
        merged = tomepass.apply(model, method, example_inputs=inputs)
        ours, theirs = (output_of(family, m(**inputs)) for m in (merged, model))
        assert torch.equal(ours, theirs)


@pytest.mark.deep  # tests/methods/test_generated_code.py compiles what they add to a graph
@every_method
@torch.no_grad()
def test_compiled_is_eager_through_both_doors(name: str, shared_models: Any) -> None:
    model, inputs, method = shared_models["vit"], make_inputs("vit"), made(name)
    merged = tomepass.apply(model, method, example_inputs=inputs)
    eager = merged(**inputs).logits
    # Half a minute each for generated code: methods have it, and their options AOTAutograd alone.
    compiler = "aot_eager" if "_" in name else "inductor"
    compiled = torch.compile(merged, fullgraph=True, backend=compiler)(**inputs).logits
    assert relative_error(compiled, eager) < 1e-4
    torch._dynamo.reset()
    backend = TomeBackend(method, inner="eager")
    # Read and rewritten a second time: what it decides is the same.
    assert torch.equal(torch.compile(model, backend=backend)(**inputs).logits, eager)


@every_method
@torch.no_grad()
def test_it_repeats_and_takes_any_batch(name: str, shared_models: Any) -> None:
    model, method = shared_models["vit"], made(name)
    inputs = make_inputs("vit", 4)["pixel_values"]
    merged = tomepass.apply(model, method, example_inputs=inputs)
    first = merged(inputs).logits
    assert torch.equal(first, merged(inputs).logits)
    assert relative_error(merged(inputs[1:2]).logits, first[1:2]) < 1e-5


@pytest.mark.deep
@pytest.mark.parametrize(
    ("family", "name"),
    at_hand(
        [("dinov2_registers", "pitome"), ("siglip_vision", "avit"), ("ast", "spvit")],
        [("siglip_vision", "avit")],
    ),
)
@torch.no_grad()
def test_elsewhere_too_it_compiles_and_takes_any_batch(
    family: str, name: str, shared_models: Any
) -> None:
    model, inputs = shared_models[family], make_inputs(family, 3)
    merged = tomepass.apply(model, made(name), example_inputs=inputs)
    first = output_of(family, merged(**inputs))
    one = output_of(family, merged(**{key: value[1:2] for key, value in inputs.items()}))
    assert relative_error(one, first[1:2]) < 1e-5
    compiled = torch.compile(merged, fullgraph=True, backend="aot_eager")
    assert relative_error(output_of(family, compiled(**inputs)), first) < 1e-4


@pytest.mark.parametrize(
    ("family", "name"),
    at_hand(
        [(f, n) for f in PARTS for n in ROWS if f == "vit" or n in ("prune", "spvit", "kmeans")],
        # One of each method; what its other rows lose is counted alike.
        [*(("vit", n) for n in WHOLE[::2]), ("siglip_vision", "spvit"), ("ast", "prune")],
    ),
)
def test_tokens_and_macs_are_as_planned(family: str, name: str, shared_models: Any) -> None:
    model, inputs = shared_models[family], make_inputs(family)
    applied = make_applied(model, made(name), inputs)
    (stream,) = applied.report.streams
    assert [block.tokens_out for block in stream.blocks] == [
        stream.tokens - 5,
        stream.tokens - 5,
        stream.tokens - 14,
    ]
    assert_macs_are_foretold(applied.capture.graph, made(name), applied.graph)
    goal = made(name).replace(macs=0.8)
    applied = make_applied(model, goal, inputs)
    assert_macs_are_foretold(applied.capture.graph, goal, applied.graph)
    report = applied.report
    # A step of a count takes one token more, one of a rate up to one in each of three blocks.
    least = 0.78 if goal.standard.kind == "keep_rate" else 0.79
    assert least < report.macs / report.macs_original <= 0.8


@every_method
def test_it_travels_as_json_and_by_replace(name: str) -> None:
    method = made(name, 8, protected=(0,))
    again = method_from_dict(method.to_dict())
    assert again == method
    assert hash(again) == hash(method)
    assert type(method).from_json(method.to_json()) == method
    assert method.replace(r=8) == method != method.replace(r=9)
    assert repr(method.schedule) in repr(method)


@pytest.fixture(scope="module")
def without_positions() -> tuple[Any, Capture, dict[str, Any]]:
    """A model to which the patches of an image of one colour are all alike."""
    model, inputs = make_model("vit"), make_inputs("vit")
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.zero_()
        return model, capture_module(model, inputs), inputs


@pytest.mark.parametrize("name", at_hand(ROWS, WHOLE[1::2]))
@torch.no_grad()
def test_duplicates_are_lossless_or_it_is_said_why_not(name: str, without_positions: Any) -> None:
    (model, capture, inputs), method = without_positions, made(name)
    found = check_duplicates(model, capture, method, inputs)
    changed = all_alike(model, capture, method, inputs)
    if method.lossy:
        assert found.blind == method.lossy
        assert changed > LOST
        return
    # Were what the reason says all there is, proportional attention would make it lossless.
    counting = method if method.prop_attn else method.replace(prop_attn=True)
    assert all_alike(model, capture, counting, inputs) < LOST
    if not method.prop_attn:
        assert found.blind == "proportional attention is off"
        return
    assert found.blind is None, found.blind
    assert found.error < 1e-4
    assert found.control > 1e-3


def all_alike(model: Any, capture: Capture, method: Method, inputs: Any) -> float:
    """How much reducing patches that are all alike changes the logits."""
    pixels = inputs["pixel_values"].mean((2, 3), keepdim=True).expand_as(inputs["pixel_values"])
    values = [*read_state(model, capture), pixels.contiguous()]
    method = method.replace(r=[5, 9, 0])  # what the last block loses, the class token never sees
    reduced = rewrite(capture.graph, plan_graph(capture.graph, method)).module(*values)
    (ours,), (theirs,) = map(tree_leaves, (reduced, capture.graph.module(*values)))
    return relative_error(ours, theirs)


LOSSES = [
    (EViT(R, prop_attn=True), False),
    (EViT(R, fuse=False), True),
    (SPViT(R), False),
    (DiffRate(R), True),
    (DiffRate(R, pruned=0.0), False),
    (DiffRate(R, pruned=(0, 0, 0)), False),
    (ToFu(R), True),
    (ToFu(R, strategies=("merge",) * 3), False),
]


@pytest.mark.parametrize(
    ("method", "lossy"),
    at_hand(
        LOSSES,
        [LOSSES[i] for i in (0, 1, 4, 7)],
        [repr(method) for method, _ in LOSSES],
    ),
)
@torch.no_grad()
def test_what_a_method_says_it_loses_is_lost(
    method: Method, lossy: bool, without_positions: Any
) -> None:
    model, capture, inputs = without_positions
    assert bool(method.lossy) == lossy
    assert (all_alike(model, capture, method, inputs) > LOST) == lossy
    if not lossy:
        found = check_duplicates(model, capture, method, inputs)
        assert found.blind is None, found.blind
        assert found.error < 1e-4
