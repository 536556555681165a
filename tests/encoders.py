"""Small encoders written by hand, composed of choices, to test how graphs are read.

    model = make(norm="post", qkv="fused", start=2, readout="mean")
    x = duplicates()                         # [3, 3, 24, 24]: few kinds of patches, many times
    with_zero_positions(model)               # now equal patches stay equal tokens

Every encoder sees 36 patches. Weights are seeded and large enough for attention to matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tomepass import Report, ToMe, TomeError
from tomepass.capture.dynamo import capture_dynamo
from tomepass.capture.exported import capture_module
from tomepass.graphs.canonical import CanonicalGraph
from tomepass.planning.plan_graph import plan_graph
from tomepass.reporting.report import make_report
from tomepass.rewriting.sweep import rewrite

PATCH, GRID = 4, 6
PATCHES = GRID * GRID
HEADS = 2

Norm = Literal["pre", "post", "parallel"]
Qkv = Literal["split", "fused", "chunk"]
Readout = Literal["class", "last", "mean", "patches", "dense"]
# How often each kind of patch occurs on the grid; unequal, or forgetting sizes would not show.
SHARES = (21, 10, 5)


class Attention(nn.Module):
    """Multi-head attention; subclasses change one thing about it."""

    def __init__(self, width: int, qkv: Qkv = "split") -> None:
        super().__init__()
        self.form = qkv
        self.qkv = nn.Linear(width, 3 * width)
        if qkv == "split":
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
            del self.qkv
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(*self.heads(x))
        return self.out(y.transpose(1, 2).reshape(x.shape))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, tokens, width = x.shape
        if self.form == "fused":
            qkv = self.qkv(x).view(batch, tokens, 3, HEADS, width // HEADS)
            return qkv.permute(2, 0, 3, 1, 4).unbind(0)
        parts = (
            self.qkv(x).chunk(3, dim=-1)
            if self.form == "chunk"
            else (self.q(x), self.k(x), self.v(x))
        )
        return tuple(p.view(batch, tokens, HEADS, -1).transpose(1, 2) for p in parts)


class Causal(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Windows(Attention):
    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        return super().forward(x.reshape(-1, tokens // 3, width)).reshape(batch, tokens, width)


class ByHand(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


class DecomposedBias(Attention):
    """A position bias computed from the queries, as windowed models have it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.rows = nn.Parameter(torch.randn(37, 8))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) + q @ self.rows.T
        return scores.softmax(-1) @ v


class Block(nn.Module):
    """A transformer block."""

    def __init__(
        self,
        width: int,
        *,
        norm: Norm = "pre",
        qkv: Qkv = "split",
        layer_scale: bool = False,
        drop_path: bool = False,
        swapped: bool = False,
    ) -> None:
        super().__init__()
        self.norm, self.swapped, self.drop_path = norm, swapped, drop_path
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, qkv)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        if layer_scale:
            self.scale1, self.scale2 = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.layer_scale = layer_scale

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == "parallel":
            y = self.norm1(x)
            return self.add(self.add(x, self.attention(y), 1), self.mlp(y), 2)
        if self.norm == "post":
            x = self.norm1(self.add(x, self.attention(x), 1))
            return self.norm2(self.add(x, self.mlp(x), 2))
        x = self.add(x, self.attention(self.norm1(x)), 1)
        return self.add(x, self.mlp(self.norm2(x)), 2)

    def add(self, x: Tensor, update: Tensor, half: int) -> Tensor:
        if self.layer_scale:
            update = update * (self.scale1 if half == 1 else self.scale2)
        if self.drop_path:
            keep = torch.full((x.shape[0], 1, 1), 0.9, device=x.device)
            update = update.div(0.9) * torch.floor(keep + 0.5)
        return update + x if self.swapped else x + update


def with_attention(cls: type[Attention], width: int) -> Block:
    """A block with another attention."""
    block = Block(width)
    block.attention = cls(width)
    return block


def near(cls: type[Any]) -> Callable[[int], nn.Module]:
    """The maker of a block that is one step from a transformer block."""
    return cls if issubclass(cls, Block) else partial(with_attention, cls)


class Encoder(nn.Module):
    """Patches, tokens of its own at the start and the end, blocks, and a readout.

    ``blocks`` makes other blocks; subclasses override :meth:`embed` or :meth:`read`.
    """

    def __init__(
        self,
        *,
        depth: int = 2,
        width: int = 16,
        start: int = 1,
        end: int = 0,
        readout: Readout = "class",
        blocks: Sequence[Callable[[int], nn.Module]] | None = None,
        **choices: Any,
    ) -> None:
        super().__init__()
        self.start, self.end, self.readout = start, end, readout
        self.patches = nn.Conv2d(3, width, PATCH, PATCH)
        self.first = nn.Parameter(torch.randn(1, start, width))
        self.last = nn.Parameter(torch.randn(1, end, width))
        self.positions = nn.Parameter(torch.randn(1, start + PATCHES + end, width))
        makers = blocks if blocks is not None else [partial(Block, **choices)] * depth
        self.blocks = nn.ModuleList(make_block(width) for make_block in makers)
        self.final = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, pixels: Tensor) -> Any:
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return self.read(self.final(x))

    def embed(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        parts = [x]
        if self.start:
            parts.insert(0, self.first.expand(x.shape[0], -1, -1))
        if self.end:
            parts.append(self.last.expand(x.shape[0], -1, -1))
        x = torch.cat(parts, dim=1) if len(parts) > 1 else x
        return x + self.positions

    def read(self, x: Tensor) -> Any:
        if self.readout == "class":
            return self.head(x[:, 0])
        if self.readout == "last":
            return self.head(x[:, -1])
        if self.readout == "mean":
            return self.head(x.mean(1))
        if self.readout == "patches":
            return self.head(x[:, self.start : x.shape[1] - self.end].mean(dim=1))
        return self.head(x)


def make(cls: type[nn.Module] = Encoder, **choices: Any) -> Any:
    """A seeded model in eval mode, its weights scaled up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return scaled_up(cls(**choices))


def scaled_up(model: nn.Module) -> nn.Module:
    """Freshly initialised attention is nearly uniform: make it choose."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def pixels(batch: int = 2, seed: int = 0) -> Tensor:
    """Random images for the encoders."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, GRID * PATCH, GRID * PATCH, generator=generator)


def kinds(batch: int = 3, patches: int = PATCHES, seed: int = 0) -> Tensor:
    """Which kind each patch is, ``[B, patches]``: shuffled, in the proportions of ``SHARES``."""
    generator = torch.Generator().manual_seed(seed)
    counts = [patches * share // sum(SHARES) for share in SHARES]
    counts[0] += patches - sum(counts)
    row = torch.cat([torch.full((count,), kind) for kind, count in enumerate(counts)])
    return torch.stack([row[torch.randperm(patches, generator=generator)] for _ in range(batch)])


def duplicates(
    batch: int = 3, *, channels: int = 3, patch: int = PATCH, grid: int = GRID, seed: int = 0
) -> Tensor:
    """Images of a few kinds of patches, each many times: ``[B, C, H, W]``."""
    generator = torch.Generator().manual_seed(seed + 1)
    layout = kinds(batch, grid * grid, seed).view(batch, grid, grid)
    drawn = torch.randn(len(SHARES), channels, patch, patch, generator=generator)
    # [B, rows, columns, C, p, p] -> [B, C, rows p, columns p]
    tiles = drawn[layout].permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(batch, channels, grid * patch, grid * patch)


def with_zero_positions(model: nn.Module) -> Any:
    """The same model, every parameter whose name says position set to zero."""
    found = [p for name, p in model.named_parameters() if "position" in name]
    with torch.no_grad():
        for parameter in found:
            parameter.zero_()
    return model


def exported(model: nn.Module, inputs: dict[str, Tensor]) -> CanonicalGraph:
    """The graph ``apply`` works on."""
    return capture_module(model, inputs).graph


def compiled(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> CanonicalGraph:
    """The graph the backend works on: all of the model's, in one piece."""
    seen: list[CanonicalGraph] = []

    def backend(gm: fx.GraphModule, example: list[Any]) -> Any:
        seen.append(capture_dynamo(gm, example))
        return gm.forward

    torch.compile(model, backend=backend, fullgraph=True, **options)(**inputs)
    (graph,) = seen
    return graph


def report_on(graph: CanonicalGraph, method: ToMe) -> Report:
    """What is found in a graph, and done to it."""
    planned = plan_graph(graph, method)
    try:
        rewritten = rewrite(graph, planned) if planned.streams else None
    except TomeError as refused:
        return make_report("the graph", graph, planned, None, refused)
    return make_report("the graph", graph, planned, rewritten, None)
