"""What a method reads as attention is the model's own: bias, scale and sizes, fused or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from depth import at_hand
from encoders import pixels
from generated import Kind, Spelling, build
from torch import nn
from zoo import relative_error

import tomepass
from tomepass import ATS, DiffRate, EViT, Prune, SPViT, ToMe, TomeBackend
from tomepass.capture.captured import read_state
from tomepass.methods import Method
from tomepass.ops.attending.attention_to import attention_to
from tomepass.proof.replay import Recorder

COUNTS = [9, 7, 5]
READERS: dict[str, Callable[[], Method]] = {
    "prune": lambda: Prune(COUNTS),
    "prune received": lambda: Prune(COUNTS, score="attention_received"),
    "evit": lambda: EViT(COUNTS),
    "spvit": lambda: SPViT(COUNTS),
    "diffrate": lambda: DiffRate(COUNTS),
    "ats": lambda: ATS(COUNTS),
    "importance": lambda: ToMe(COUNTS, importance="class_attention"),
}
KINDS: dict[str, Kind] = {
    "bias": Kind(position="bias", depth=3, scale="explicit"),
    "shared bias": Kind(position="shared bias", depth=3, start=0, readout="mean"),
    "gathered bias": Kind(position="gathered bias", depth=3, start=2, end=1, scale="explicit"),
    "rotary": Kind(position="rotary", depth=3, scale="explicit"),
}
# What each method is read on: every kind is there for several methods, and quickly for one.
PAIRS = [
    (name, list(KINDS)[(place + offset) % len(KINDS)])
    for place, name in enumerate(READERS)
    for offset in (0, 1)
]


def in_both_spellings(kind: Kind) -> tuple[nn.Module, nn.Module]:
    fused, written = (build(kind, Spelling(product=p)).double() for p in ("sdpa", "matmul"))
    return fused, written


@torch.no_grad()
@pytest.mark.parametrize(("method", "kind"), at_hand(PAIRS, [PAIRS[0], PAIRS[5]]))
def test_fused_and_written_out_attention_are_read_alike(method: str, kind: str) -> None:
    x, made = pixels(3).double(), READERS[method]()
    fused, written = in_both_spellings(KINDS[kind])
    assert relative_error(fused(x), written(x)) < 1e-9
    ours, theirs = (tomepass.apply(m, made, example_inputs=x)(x) for m in (fused, written))
    assert relative_error(ours, theirs) < 1e-6
    assert relative_error(ours, fused(x)) > 1e-4  # something was reduced


@torch.no_grad()
@pytest.mark.parametrize(
    ("product", "name"),
    at_hand(
        itertools.product(["folded sdpa", "grouped sdpa"], ["prune", "spvit", "importance"]),
        [("folded sdpa", "prune"), ("grouped sdpa", "importance")],
    ),
)
def test_so_are_heads_that_stand_elsewhere(product: str, name: str) -> None:
    x, kind = pixels(3).double(), KINDS["rotary"]
    other = build(kind, Spelling(product=product)).double()  # type: ignore[arg-type]
    fused, _ = in_both_spellings(kind)
    ours = tomepass.apply(other, READERS[name](), example_inputs=x)(x)
    theirs = tomepass.apply(fused, READERS[name](), example_inputs=x)(x)
    assert relative_error(ours, theirs) < 1e-6


@torch.no_grad()
def test_so_it_is_in_the_other_door() -> None:
    x = pixels(3).double()
    fused, written = in_both_spellings(replace(KINDS["bias"], depth=2))
    backend = TomeBackend(Prune([9, 7]), inner="eager")
    ours, theirs = (torch.compile(m, backend=backend)(x) for m in (fused, written))
    assert relative_error(ours, theirs) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("received", [False, True])
def test_the_weights_are_those_of_the_attention(received: bool) -> None:
    """What is read before any merge, held against the softmax that the model itself computes."""
    x = pixels(2).double()
    fused, _ = in_both_spellings(KINDS["bias"])
    score = "attention_received" if received else "class_attention"
    merged = tomepass.apply(fused, Prune(COUNTS, score=score), example_inputs=x)  # type: ignore[arg-type]
    applied = merged.captured(x)
    recorder = Recorder(applied.graph, [attention_to])
    recorder.run(*read_state(fused, applied.capture), x)
    attention = fused.blocks[0].attention
    q, k, _ = attention.heads(fused.blocks[0].norm1(fused.embed(x)), late=False)
    weights = (q @ k.mT * KINDS["bias"].factor + attention.bias()).softmax(-1).mean(1)
    expected = weights.mean(1) if received else weights[:, 0]
    torch.testing.assert_close(recorder.calls[0].result, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(7, 7), (4, 7, 7), (1, 4, 7, 7), (2, 4, 7, 7), (1, 1, 1, 7)])
@pytest.mark.parametrize("queries", [[0], [1, 3], []])
def test_a_bias_is_added_to_the_scores(shape: tuple[int, ...], queries: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 4, 7, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(shape, generator=generator, dtype=torch.float64)
    got = attention_to(q, k, None, queries, 0.3, bias)
    weights = (q @ k.mT * 0.3 + bias).softmax(-1)
    expected = weights[:, :, queries or slice(None)].mean((1, 2))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
