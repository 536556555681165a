"""What ``explain`` answers: figures, reasons, and a printed form to paste."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from encoders import (
    Block,
    DecomposedBias,
    Encoder,
    compiled,
    exported,
    make,
    near,
    pixels,
    report_on,
)
from torch import Tensor
from zoo import make_inputs

import tomepass
from tomepass import Report, ToMe, TomeError
from tomepass.planning.plan_graph import plan_graph
from tomepass.reading.mismatch import Mismatch
from tomepass.reporting.report import make_report

pytestmark = pytest.mark.usefixtures("captured_once")


@functools.cache
def small() -> Any:
    """One encoder for all that do not ask for another."""
    return make()


def explained(model: Any = None, r: Any = 4, **options: Any) -> Report:
    """What is said of a small encoder."""
    model = small() if model is None else model
    return tomepass.explain(model, r=r, example_inputs=pixels(), **options)


# 37 tokens of 16 channels, an MLP of 32; 36 patches of 48 numbers; a head of 5.
def encoder_macs(tokens: list[tuple[int, int]]) -> list[int]:
    """Multiply-accumulates of each block, from tokens before and after its merge."""
    return [n * 4 * 256 + 2 * n * n * 16 + m * 2 * 512 for n, m in tokens]


def test_the_figures_are_worked_out_by_hand() -> None:
    report = explained(r=[6, 4])
    around = 36 * 48 * 16 + 16 * 5
    before, after = encoder_macs([(37, 37)] * 2), encoder_macs([(37, 31), (31, 27)])
    assert [b.macs_original for b in report.blocks] == before
    assert [b.macs for b in report.blocks] == after
    assert report.macs_original == sum(before) + around
    # One column more: the last norm and head see the same, the class token alone.
    assert report.macs == sum(after) + around
    assert report.speedup_ideal == pytest.approx(report.macs_original / report.macs)
    assert report.speedup_ideal > 1.1
    assert report.macs_overhead > 0


def test_blocks_name_their_nodes_and_lines() -> None:
    graph = exported(make(), {"pixels": pixels()})
    nodes = {n.name for n in graph.graph.nodes}
    for block in report_on(graph, ToMe(4)).blocks:
        assert {block.entry, block.attention, block.join, block.merge_at} <= nodes
        assert "encoders.py" in str(block.source)
        assert "attend" in str(block.source)


def test_both_doors_report_the_same_figures(family: str, shared_models: Any) -> None:
    graphs = (door(shared_models[family], make_inputs(family)) for door in (exported, compiled))
    one, other = (report_on(graph, ToMe(5)) for graph in graphs)
    for name in ("macs_original", "macs", "macs_overhead", "protected"):
        assert getattr(one, name) == getattr(other, name)
    assert [b.macs for b in one.blocks] == [b.macs for b in other.blocks]


def test_nothing_merged_costs_what_it_cost() -> None:
    report = explained(r=0)
    assert report.ok
    assert report.macs == report.macs_original
    assert report.macs_overhead == 0
    assert report.speedup_ideal == 1.0


def test_a_mismatch_is_reported_not_raised() -> None:
    report = explained(make(blocks=[near(DecomposedBias), near(DecomposedBias)]))
    assert not report.ok
    assert report.blocks == ()
    assert report.protected == ()
    assert [m.block for m in report.refused] == [0, 1]
    assert report.speedup_ideal == 1.0
    error = report.refusal()
    assert isinstance(error, TomeError)
    assert "Encoder cannot be merged" in error.reason
    assert (error.block, error.node) == (0, "softmax")


class Shifted(Block):
    """Refused while it is rewritten, not while it is read."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + x.roll(1, 1)


def test_a_mismatch_found_while_rewriting_is_reported_with_all_it_says() -> None:
    report = explained(make(blocks=[Shifted, Shifted]))
    assert not report.ok
    (refused,) = report.refused
    assert refused.block == 0
    assert refused.node == "add_3"
    assert "test_report.py" in str(refused.source)
    assert "'roll' brings one row a token" in refused.reason


def test_a_model_without_attention_is_reported() -> None:
    report = explained(make(blocks=[]))
    assert not report.ok
    assert "no attention" in report.refused[0].reason


def test_readouts_are_named() -> None:
    def readout(**choices: Any) -> list[str]:
        (stream,) = explained(make(**choices), r=[6, 4]).streams
        return [entry.split(": ")[1] for entry in stream.readout]

    assert readout() == ["reads tokens [0]"]
    assert readout(end=2, readout="last") == ["reads tokens [38]"]
    assert readout(readout="mean") == ["mean over tokens, weighted by size"]
    assert readout(readout="dense") == ["returned unmerged from 27 to 37 tokens"]


def test_merged_outputs_are_named_as_such() -> None:
    (stream,) = explained(make(readout="dense"), r=[6, 4], outputs="merged").streams
    assert stream.readout[0].split(": ")[1] == "returned merged, 27 tokens"


class Grid(Encoder):
    def read(self, x: Tensor) -> Tensor:
        return x[:, 1:].unflatten(1, (6, 6))


def test_readers_by_position_are_named_with_the_reason() -> None:
    (unmerged,) = explained(make(Grid)).unmerged
    assert unmerged.node == "unflatten"
    assert "splits the axis" in unmerged.reason
    assert "encoders.py" in str(unmerged.source)


@pytest.mark.parametrize("model", [{}, {"blocks": []}, {"blocks": [Shifted, Shifted]}])
def test_a_report_converts_to_json(model: dict[str, Any]) -> None:
    report = explained(make(**model))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is report.ok
    assert data["model"] == "Encoder"
    assert data["method"] == ToMe(4).to_dict()
    assert data["speedup_ideal"] == report.speedup_ideal
    assert len(data["streams"]) == len(report.streams)
    assert [m["reason"] for m in data["refused"]] == [m.reason for m in report.refused]


# ---- the printed form ------------------------------------------------------------------------


def test_the_table_can_be_pasted() -> None:
    text = str(explained(make(start=2, end=1, readout="patches"), r=[6, 4]))
    expected = [
        "Encoder: ToMe(r=[6, 4])",
        "",
        "  block     tokens   r        MACs   of original   attention at",
        " ─────────────────────────────────────────────────────────────────",
        "  0       39 -> 33   6   122.400 k           95%   encoders.py:LINE",
        "  1       33 -> 29   4    98.336 k           76%   encoders.py:LINE",
        "",
        "  protected  tokens 0-1, 38",
        "  read by    mean: mean over tokens, weighted by size",
    ]
    lines = [re.sub(r"py:\d+", "py:LINE", line) for line in text.splitlines()]
    assert [line.rstrip() for line in lines[: len(expected)]] == expected
    assert lines[9].startswith("  MACs       284.816 k an image unmerged, 248.464 k merged: ideal")
    assert lines[11] == "  paths      1 attention: log(size) as a bias"
    assert lines[12] == "  inputs     pixels float32[B, 3, 24, 24]"
    assert lines[13].startswith("  versions   Python")
    assert f"torch {torch.__version__}" in lines[13]


def test_a_refusal_can_be_pasted() -> None:
    text = str(explained(make(blocks=[near(DecomposedBias)] * 3)))
    assert "Encoder: ToMe(r=4): left unmerged" in text
    assert text.count("refused") == 1
    assert "- blocks 0-2, node softmax, tests/encoders.py:" in text
    assert "- y = self.attend(*self.heads(x))" in text
    assert '- what to do: load the model with attn_implementation="sdpa"' in text


@pytest.mark.parametrize(
    "choices", [{}, {"blocks": [Shifted] * 2}, {"blocks": [near(DecomposedBias)]}, {"cls": Grid}]
)
def test_no_line_is_longer_than_100_columns(choices: dict[str, Any]) -> None:
    for width in map(len, str(explained(make(**choices))).splitlines()):
        assert width <= 100


def test_the_batch_is_called_b_whatever_its_symbol() -> None:
    report = explained(make(Grid))
    assert report.inputs == "pixels float32[B, 3, 24, 24]"
    assert "[B, 36, 16] to [B, 6, 6, 16]" in report.unmerged[0].reason


def test_two_streams_are_told_apart() -> None:
    class Towers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Encoder(), Encoder(start=0, readout="mean")

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.one(left) + self.other(right)

    inputs = {"left": pixels(), "right": pixels()}
    text = str(tomepass.explain(make(Towers), r=4, example_inputs=inputs))
    assert "Towers: ToMe(r=4), stream 0" in text
    assert "Towers: ToMe(r=4), stream 1" in text
    assert "protected  token 0" in text
    assert "protected  no token" in text


def test_what_failed_while_rewriting_is_the_first_reason() -> None:
    graph = exported(make(), {"pixels": pixels()})
    planned = replace(plan_graph(graph, ToMe(4)), mismatches=(Mismatch("another stream"),))
    report = make_report("a model", graph, planned, None, TomeError("while rewriting", block=1))
    assert [refused.reason for refused in report.refused] == ["while rewriting", "another stream"]
    assert (report.refusal().block, report.ok) == (1, False)
