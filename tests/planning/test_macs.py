"""Multiply-accumulates: published figures, and node counts against torch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from depth import at_hand
from encoders import exported, make, pixels
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tracing import capture

import tomepass
from tomepass.capture.exported import capture_module
from tomepass.counts.schedule import capped, counts_per_block, parse_schedule
from tomepass.ops.library import is_overhead
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge
from tomepass.planning.macs import batch_of, macs_by_name, node_macs

GIGA = 1e9


class Size(NamedTuple):
    width: int
    blocks: int
    patches: int = 196
    patch: int = 16


SIZES = {
    "DeiT-Ti": Size(192, 12),
    "DeiT-S": Size(384, 12),
    "ViT-B": Size(768, 12),
    "ViT-L": Size(1024, 24),
    "ViT-H/14": Size(1280, 32, 256, 14),
}


def gmacs(size: Size, r: Any) -> float:
    """The formula of the papers, class token and 1000 classes included."""
    c, tokens = size.width, size.patches + 1
    total = size.patches * c * 3 * size.patch**2 + 1000 * c
    for asked in counts_per_block(parse_schedule(r), size.blocks):
        left = tokens - capped(asked, tokens, (0,))
        total += 4 * tokens * c**2 + 2 * tokens**2 * c + 8 * left * c**2
        tokens = left
    return total / GIGA


@pytest.mark.parametrize(
    ("model", "r", "published", "exact"),
    [
        ("DeiT-Ti", 8, 0.9, 0.924),
        ("DeiT-Ti", 12, 0.8, 0.769),
        ("DeiT-Ti", 16, 0.6, 0.622),
        ("DeiT-S", 0, 4.6, 4.599),
        ("DeiT-S", 8, 3.4, 3.416),
        ("DeiT-S", 13, 2.7, 2.703),
        ("DeiT-S", 16, 2.3, 2.291),
        ("ViT-B", 0, None, 17.564),
        ("ViT-B", 8, None, 13.104),
        ("ViT-B", 13, None, 10.367),
        ("ViT-B", 16, None, 8.772),
        ("ViT-L", 0, 61.6, 61.555),
        ("ViT-L", 8, 31.0, 30.963),
        ("ViT-L", (8, -1), 22.3, 22.325),
        ("ViT-H/14", 0, 167.4, 167.295),
        ("ViT-H/14", 7, 92.9, 92.835),
        ("ViT-H/14", (7, -1), 72.6, 72.547),
    ],
)
def test_schedules_give_the_published_macs(
    model: str, r: Any, published: float | None, exact: float
) -> None:
    assert gmacs(SIZES[model], r) == pytest.approx(exact, abs=5e-4)
    if published is not None:
        # Within 0.1, and what rounding to one decimal adds for the largest.
        assert gmacs(SIZES[model], r) == pytest.approx(published, abs=0.11)


@pytest.mark.parametrize(("model", "r"), at_hand([("DeiT-Ti", 8), ("ViT-B", (16, 0))], []))
def test_counting_a_real_graph_gives_the_formula(model: str, r: Any) -> None:
    size = SIZES[model]
    config = transformers.ViTConfig(
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.width // 64,
        num_labels=1000,
    )
    with torch.device("meta"):
        network = transformers.ViTForImageClassification(config).eval()
    network.to_empty(device="cpu")  # the values do not matter, and take long to draw
    report = tomepass.explain(network, r=r)
    assert report.macs_original / GIGA == pytest.approx(gmacs(size, 0), rel=2e-3)
    assert report.macs / GIGA == pytest.approx(gmacs(size, r), rel=2e-3)
    assert report.speedup_ideal == pytest.approx(gmacs(size, 0) / gmacs(size, r), rel=2e-3)
    # A block's share, and all blocks' shares but for embedding and head.
    c, tokens = size.width, size.patches + 1
    whole = 4 * tokens * c**2 + 2 * tokens**2 * c + 8 * tokens * c**2
    assert report.blocks[0].macs_original == whole
    around = size.patches * c * 3 * size.patch**2 + 1000 * c
    assert report.macs == sum(block.macs for block in report.blocks) + around
    # Merging is a product of N' by N by C, a block 12 N C C: the narrower, the dearer.
    assert 0 < report.macs_overhead < 0.1 * tokens / c * report.macs


# Node by node


def counted(function: Callable[..., Any], *inputs: Tensor) -> tuple[int, float]:
    """MACs of a function by our count, and by torch's, which counts two operations a MAC."""
    graph = capture(function, *inputs).graph
    # Its counter knows no fused attention of the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function(*inputs)
    return sum(node_macs(node) for node in graph.nodes), counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, w, b: F.linear(x, w, b), [(2, 5, 8), (6, 8), (6,)]),
        (lambda x, w: F.linear(x, w), [(8,), (6, 8)]),
        (lambda x, y: x @ y, [(2, 3, 5, 8), (2, 3, 8, 4)]),
        (lambda x, y: x @ y, [(2, 3, 5, 8), (8, 4)]),
        (lambda x, y: torch.bmm(x, y), [(2, 5, 8), (2, 8, 4)]),
        (lambda x, y: x.mm(y), [(5, 8), (8, 4)]),
        (lambda b, x, y: torch.addmm(b, x, y), [(4,), (5, 8), (8, 4)]),
        (lambda x, w: F.conv2d(x, w, stride=4), [(2, 3, 16, 16), (6, 3, 4, 4)]),
        (lambda x, w: F.conv2d(x, w, padding=1, groups=3), [(2, 6, 8, 8), (9, 2, 3, 3)]),
        (lambda x, w: F.conv2d(x, w, padding="same"), [(2, 3, 8, 8), (4, 3, 3, 3)]),
        (lambda x, w: F.conv1d(x, w), [(2, 3, 16), (6, 3, 4)]),
        (lambda x, w: F.conv3d(x, w, stride=2), [(2, 3, 4, 8, 8), (6, 3, 2, 2, 2)]),
        (F.scaled_dot_product_attention, [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)]),
        (F.scaled_dot_product_attention, [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)]),
        (lambda x: F.gelu(x).softmax(-1) + x.mean(), [(2, 5, 8)]),
    ],
)
def test_every_product_is_counted_as_torch_counts_it(
    function: Callable[..., Any], shapes: list[tuple[int, ...]]
) -> None:
    ours, theirs = counted(function, *(torch.rand(shape) for shape in shapes))
    assert ours == theirs


def test_what_is_no_product_counts_nothing_and_merging_is_overhead() -> None:
    def merged(keys: Tensor, x: Tensor) -> Tensor:
        return merge(torch.tanh(x), None, match(keys, 4, [0]), 13)

    graph = capture(merged, torch.rand(2, 3, 17, 8), torch.rand(2, 17, 6)).graph
    macs = {node.name: node_macs(node) for node in graph.nodes}
    own = {node.name for node in graph.nodes if is_overhead(node)}
    assert own == {"match", "merge"}
    assert macs["match"] == 2 * 8 * 8 * 8  # images, even by odd of 16 free tokens, channels
    assert macs["merge"] == 2 * 13 * 17 * 6  # one product with the weights
    assert sum(macs.values()) == macs["match"] + macs["merge"]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_capture_counts_with_the_batch_it_was_made_with(batch: int) -> None:
    model = torch.nn.Linear(8, 3)
    captured = capture_module(model, {"input": torch.rand(batch, 5, 8)}).graph
    assert batch_of(captured) == 2
    assert sum(map(node_macs, captured.graph.nodes)) == 2 * 5 * 8 * 3


def test_what_no_output_reads_costs_nothing() -> None:
    graph = exported(make(), {"pixels": pixels()})
    before = macs_by_name(graph)
    first = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.linear.default)
    with graph.graph.inserting_after(first):
        unread = graph.graph.node_copy(first)
    assert node_macs(unread) > 0
    after = macs_by_name(graph)
    assert after.pop(unread.name) == 0
    assert after == before
