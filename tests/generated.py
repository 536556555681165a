"""Small encoders composed by hypothesis: what they compute, and how that is written.

    what, how = Kind(position="rotary"), Spelling(product="einsum")
    model = build(what, how)                 # 36 patches and protected tokens in, see encoders.py

Two encoders of one kind hold the same weights whatever their spelling, and compute the same. So
merged ones must agree with each other, on any image, whatever their positions say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from encoders import GRID, HEADS, PATCH, PATCHES, Norm, scaled_up
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH = 16
DEPTH = WIDTH // HEADS

Position = Literal[
    "none",
    "learned",
    "patches",
    "every block",
    "rotary",
    "patch rotary",
    "bias",
    "shared bias",
    "gathered bias",
]
Readout = Literal[
    "class",
    "last",
    "mean",
    "patches",
    "class and patches",
    "dense",
    "grid",
    "hidden",
    "attention",
    "multihead",
    "multihead with weights",
    "softmax",
    "bright",
]
BIASES = ("bias", "shared bias", "gathered bias")
ROTARIES = ("rotary", "patch rotary")


@dataclass(frozen=True)
class Kind:
    """What an encoder computes."""

    norm: Norm = "pre"
    norm_kind: Literal["layer", "rms", "rms by hand"] = "layer"
    mlp: Literal["gelu", "tanh gelu", "swiglu"] = "gelu"
    layer_scale: bool = False
    query_norm: bool = False
    start: int = 1
    end: int = 0
    position: Position = "learned"
    readout: Readout = "class"
    depth: int = 2
    scale: Literal["default", "explicit"] = "default"
    stem: int = 0

    @property
    def factor(self) -> float:
        """What scores are multiplied by."""
        return DEPTH**-0.5 if self.scale == "default" else 0.5


@dataclass(frozen=True)
class Spelling:
    """How it is written."""

    qkv: Literal["split", "fused", "fused unbind", "chunk", "split sizes", "interleaved"] = "split"
    heads: Literal["view", "reshape", "unflatten", "permute", "einsum", "movedim"] = "view"
    product: Literal[
        "sdpa",
        "folded sdpa",
        "grouped sdpa",
        "matmul",
        "operator",
        "bmm",
        "baddbmm",
        "einsum",
        "late einsum",
    ] = "sdpa"
    scale: Literal["query", "both", "scores", "divided"] = "scores"
    softmax: Literal["method", "function", "float32", "typed", "module"] = "method"
    dropout: bool = False
    back: Literal["flatten", "reshape", "view", "einsum", "permute"] = "reshape"
    rotation: Literal["halves", "pairs"] = "halves"
    parting: Literal["split", "slices", "copy"] = "split"
    swapped: bool = False
    drop_path: bool = False
    gate: Literal["split", "chunk"] = "split"
    residual: Literal["sum", "in place", "torch.add"] = "sum"


def kinds() -> st.SearchStrategy[Kind]:
    """Any kind whose readout finds the token it reads."""
    counts = {"start": st.integers(0, 5), "end": st.integers(0, 5), "depth": st.integers(1, 3)}
    return drawn(Kind, **counts, stem=st.integers(0, 3)).map(_with_its_tokens)


def spellings() -> st.SearchStrategy[Spelling]:
    """Any spelling."""
    return drawn(Spelling)


def drawn(cls: type[Any], **given: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Instances of a dataclass of choices, each field drawn from what its annotation allows."""
    return st.builds(cls, **{n: given.get(n, ...) for n in cls.__dataclass_fields__})


def _with_its_tokens(kind: Kind) -> Kind:
    if kind.readout in ("class", "class and patches") and not kind.start:
        return replace(kind, start=1)
    if kind.readout == "last" and not kind.end:
        return replace(kind, end=1)
    return kind


def build(kind: Kind, spelling: Spelling | None = None, *, seed: int = 0) -> nn.Module:
    """A seeded encoder in eval mode, its weights scaled up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Generated(kind, spelling or Spelling())
        scaled_up(model)
        for attention in (m for m in model.modules() if isinstance(m, Attention)):
            attention.fuse()
    return model


# ---- parts -----------------------------------------------------------------------------------


class RootMeanSquare(nn.Module):
    """RMSNorm, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype is torch.float16 else x
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * (wide * scale).to(x.dtype)


def make_norm(kind: Kind, width: int) -> nn.Module:
    if kind.norm_kind == "layer":
        return nn.LayerNorm(width)
    return nn.RMSNorm(width, eps=1e-6) if kind.norm_kind == "rms" else RootMeanSquare(width)


class Mlp(nn.Module):
    def __init__(self, kind: Kind, spelling: Spelling) -> None:
        super().__init__()
        self.kind, self.gate = kind.mlp, spelling.gate
        self.up = nn.Linear(WIDTH, 4 * WIDTH if kind.mlp == "swiglu" else 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.kind != "swiglu":
            return self.down(F.gelu(y, approximate="tanh" if "tanh" in self.kind else "none"))
        gate, y = y.chunk(2, dim=-1) if self.gate == "chunk" else y.split(2 * WIDTH, dim=-1)
        return self.down(F.silu(gate) * y)


class Rotary(nn.Module):
    """Turns queries and keys by angles that belong to positions."""

    def __init__(self, kind: Kind, spelling: Spelling) -> None:
        super().__init__()
        self.kind, self.how, self.parting = kind, spelling.rotation, spelling.parting
        rows = PATCHES if kind.position == "patch rotary" else PATCHES + kind.start + kind.end
        self.register_buffer("position_angles", torch.randn(rows, DEPTH // 2))

    def forward(self, x: Tensor, dim: int) -> Tensor:
        """Of a value whose tokens stand on ``dim``, 1 or 2 of four."""
        angles = self.position_angles.to(x.dtype)
        angles = torch.cat([angles, angles], -1)
        if dim == 1:
            angles = angles[:, None]
        cos, sin = angles.cos(), angles.sin()
        if self.kind.position == "rotary":
            return self.turned(x, cos, sin)
        first, patches, last = self.parted(x, dim)
        return torch.cat([first, self.turned(patches, cos, sin), last], dim=dim)

    def parted(self, x: Tensor, dim: int) -> tuple[Tensor, ...]:
        start, end = self.kind.start, self.kind.end
        if self.parting == "split":
            return x.split((start, PATCHES, end), dim=dim)
        stop = x.shape[dim] - end
        if self.parting == "copy":
            return tuple(t.clone() for t in x.tensor_split((start, stop), dim=dim))
        if dim == 1:
            return x[:, :start], x[:, start:stop], x[:, stop:]
        return x[:, :, :start], x[..., start:stop, :], x[:, :, stop:]

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # The pairs are (i, i + half) either way, or the spellings would compute other things.
        left, right = x.chunk(2, dim=-1)
        if self.how == "halves":
            return x * cos + torch.cat([-right, left], dim=-1) * sin
        half = DEPTH // 2
        c, s = cos[..., :half], sin[..., :half]
        return torch.cat([left * c - right * s, left * s + right * c], dim=-1)


class Bias(nn.Module):
    """A position bias among all tokens, one a head."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        tokens = PATCHES + kind.start + kind.end
        self.gathered = kind.position == "gathered bias"
        if self.gathered:
            offsets = (2 * GRID - 1) ** 2
            self.position_table = nn.Parameter(2 * torch.randn(offsets + 3, HEADS))
            self.register_buffer("index", relative_index(kind.start, kind.end))
        else:
            self.position_table = nn.Parameter(2 * torch.randn(HEADS, tokens, tokens))

    def forward(self) -> Tensor:
        if not self.gathered:
            return self.position_table[None]
        tokens = self.index.shape[0]
        rows = self.position_table[self.index.view(-1)].view(tokens, tokens, -1)
        return rows.permute(2, 0, 1).contiguous().unsqueeze(0)


def relative_index(start: int, end: int) -> Tensor:
    """Which row of the table each pair of tokens reads, as BEiT counts them."""
    place = torch.arange(PATCHES)
    rows, columns = place // GRID, place % GRID
    down = rows[:, None] - rows[None] + GRID - 1
    across = columns[:, None] - columns[None] + GRID - 1
    tokens = start + PATCHES + end
    index = torch.full((tokens, tokens), (2 * GRID - 1) ** 2 + 2)
    index[start : start + PATCHES] = (2 * GRID - 1) ** 2
    index[:, start : start + PATCHES] = (2 * GRID - 1) ** 2 + 1
    patches = slice(start, start + PATCHES)
    index[patches, patches] = down * (2 * GRID - 1) + across
    return index


class Attention(nn.Module):
    """Multi-head attention, written in any of the ways of a spelling."""

    def __init__(self, kind: Kind, spelling: Spelling) -> None:
        super().__init__()
        self.kind, self.how = kind, spelling
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        norms = (nn.LayerNorm(DEPTH) if kind.query_norm else nn.Identity() for _ in range(2))
        self.q_norm, self.k_norm = norms
        self.rotary = Rotary(kind, spelling) if kind.position in ROTARIES else None
        self.bias = Bias(kind) if kind.position in ("bias", "gathered bias") else None
        self.softmax = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(0.1)

    def fuse(self) -> None:
        """One projection instead of three, where the spelling has that."""
        if self.how.qkv == "split":
            return
        weights = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        if self.how.qkv == "interleaved":  # [3, H, D] to [H, 3, D]
            weights = weights.view(3, HEADS, DEPTH, WIDTH).transpose(0, 1).reshape(-1, WIDTH)
            bias = bias.view(3, HEADS, DEPTH).transpose(0, 1).reshape(-1)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.qkv.weight, self.qkv.bias = nn.Parameter(weights.detach()), nn.Parameter(bias.detach())
        del self.q, self.k, self.v

    def forward(self, x: Tensor, shared: Tensor | None) -> Tensor:
        late = self.how.product == "late einsum"
        q, k, v = self.heads(x, late)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = (self.rotary(t, 1 if late else 2) for t in (q, k))
        bias = self.bias() if self.bias is not None else shared
        y = self.attend(q, k, v, bias)
        return self.joined(y, late)

    # ---- heads apart and together ----------------------------------------------------------

    def heads(self, x: Tensor, late: bool) -> tuple[Tensor, ...]:
        """Queries, keys and values: ``[B, H, N, D]``, or ``[B, N, H, D]`` if that comes late."""
        batch, tokens, _ = x.shape
        if self.how.qkv == "fused":
            q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, DEPTH).permute(2, 0, 3, 1, 4)
        elif self.how.qkv == "fused unbind":
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, DEPTH)).transpose(1, 3).unbind(2)
        elif self.how.qkv == "interleaved":
            parts = self.qkv(x).view(batch, tokens, HEADS, 3 * DEPTH).transpose(1, 2)
            q, k, v = parts.chunk(3, dim=-1)
        else:
            return tuple(self.apart(t, late) for t in self.projected(x))
        return tuple(t.transpose(1, 2) if late else t for t in (q, k, v))

    def projected(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.how.qkv == "split":
            return self.q(x), self.k(x), self.v(x)
        if self.how.qkv == "chunk":
            return self.qkv(x).chunk(3, dim=-1)
        return self.qkv(x).split([WIDTH, WIDTH, WIDTH], dim=2)

    def apart(self, x: Tensor, late: bool) -> Tensor:
        batch, tokens, width = x.shape
        form = self.how.heads
        if form == "reshape":
            y = x.reshape(batch, -1, HEADS, width // HEADS)
        elif form == "unflatten":
            y = x.unflatten(-1, (HEADS, -1))
        else:
            y = x.view(batch, tokens, HEADS, width // HEADS)
        if late:
            return y
        if form == "permute":
            return y.permute(0, 2, 1, 3)
        if form == "einsum":
            return torch.einsum("bnhd->bhnd", y)
        return y.movedim(2, 1) if form == "movedim" else y.transpose(1, 2)

    def joined(self, y: Tensor, late: bool) -> Tensor:
        form = self.how.back
        if not late and form == "einsum":
            weight = self.out.weight.view(WIDTH, HEADS, DEPTH)
            return torch.einsum("bhnd,chd->bnc", y, weight) + self.out.bias
        if not late:
            y = y.permute(0, 2, 1, 3) if form == "permute" else y.transpose(1, 2)
        if form == "flatten":
            return self.out(y.flatten(-2))
        if form == "view":
            return self.out(y.contiguous().view(y.shape[0], y.shape[1], WIDTH))
        return self.out(y.reshape(*y.shape[:2], -1))

    # ---- attention -------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        product = self.how.product
        if product.endswith("sdpa"):
            return self.fused(q, k, v, bias)
        if product in ("bmm", "baddbmm"):
            return self.folded(q, k, v, bias)
        q, k = self.scaled(q, k)
        if product == "einsum":
            weights = self.weights(torch.einsum("bhnd,bhmd->bhnm", q, k), bias)
            return torch.einsum("bhnm,bhmd->bhnd", weights, v)
        if product == "late einsum":
            weights = self.weights(torch.einsum("bnhd,bmhd->bhnm", q, k), bias)
            return torch.einsum("bhnm,bmhd->bnhd", weights, v)
        if product == "matmul":
            return torch.matmul(self.weights(torch.matmul(q, k.transpose(2, 3)), bias), v)
        return self.weights(q @ k.mT, bias) @ v

    def fused(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """In one operator, over heads as they are, folded into the batch, or in groups."""
        shape, product = q.shape, self.how.product
        if product == "folded sdpa" and bias is None:
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        elif product == "grouped sdpa" and bias is None:
            q, k, v = (t.unsqueeze(1) for t in (q, k, v))
        given = {} if self.kind.scale == "default" else {"scale": self.kind.factor}
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **given)
        return y.reshape(shape)

    def folded(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Heads folded into the batch."""
        batch, heads, tokens, depth = q.shape
        q, k = self.scaled(q, k)
        q, k, v = (t.reshape(batch * heads, -1, depth) for t in (q, k, v))
        if self.how.product == "bmm":
            scores = torch.bmm(q, k.transpose(1, 2))
        else:
            empty = q.new_empty(batch * heads, tokens, tokens)
            scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0)
        if bias is not None:
            scores = scores.view(batch, heads, tokens, tokens) + bias
            scores, bias = scores.view(batch * heads, tokens, tokens), None
        y = torch.bmm(self.weights(scores, bias), v)
        return y.view(batch, heads, tokens, depth)

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        factor = self.kind.factor
        # Scores are scaled after the product elsewhere: a bias is added to scaled ones alone.
        if self.how.scale == "both":
            return q * factor**0.5, k * factor**0.5
        if self.how.scale == "divided":
            return q / (1 / factor), k
        folded = self.how.product in ("bmm", "baddbmm")
        return (q * factor, k) if self.how.scale == "query" or folded else (q, k)

    def weights(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        if self.how.scale == "scores" and self.how.product not in ("bmm", "baddbmm"):
            scores = scores * self.kind.factor
        if bias is not None:
            scores = bias + scores if self.how.swapped else scores + bias
        weights = self.normalised(scores)
        return self.dropout(weights) if self.how.dropout else weights

    def normalised(self, scores: Tensor) -> Tensor:
        form = self.how.softmax
        if form == "float32":
            return scores.float().softmax(-1).to(scores.dtype)
        if form == "typed":
            return F.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores)
        if form == "module":
            return self.softmax(scores)
        return (
            F.softmax(scores, dim=3 if scores.ndim == 4 else 2)
            if form == "function"
            else (scores.softmax(-1))
        )


class Block(nn.Module):
    """A transformer block."""

    def __init__(self, kind: Kind, spelling: Spelling) -> None:
        super().__init__()
        self.kind, self.how = kind, spelling
        self.norm1, self.norm2 = make_norm(kind, WIDTH), make_norm(kind, WIDTH)
        self.attention, self.mlp = Attention(kind, spelling), Mlp(kind, spelling)
        self.scale1, self.scale2 = (nn.Parameter(torch.ones(WIDTH)) for _ in range(2))
        if kind.position == "every block":
            rows = kind.start + PATCHES + kind.end
            self.positions = nn.Parameter(torch.randn(1, rows, WIDTH))

    def forward(self, x: Tensor, shared: Tensor | None = None) -> Tensor:
        if self.kind.position == "every block":
            x = x + self.positions
        if self.kind.norm == "parallel":
            y = self.norm1(x)
            x = self.add(x, self.attention(y, shared), self.scale1)
            return self.add(x, self.mlp(y), self.scale2)
        if self.kind.norm == "post":
            x = self.norm1(self.add(x, self.attention(x, shared), self.scale1))
            return self.norm2(self.add(x, self.mlp(x), self.scale2))
        x = self.add(x, self.attention(self.norm1(x), shared), self.scale1)
        return self.add(x, self.mlp(self.norm2(x)), self.scale2)

    def add(self, x: Tensor, update: Tensor, scale: Tensor) -> Tensor:
        if self.kind.layer_scale:
            update = scale * update if self.how.swapped else update * scale
        if self.how.drop_path:
            keep = torch.full((x.shape[0], 1, 1), 0.9, device=x.device, dtype=x.dtype)
            update = update * torch.floor(keep + 0.5)
        if self.how.residual == "in place":
            update += x
            return update
        if self.how.residual == "torch.add":
            return torch.add(x, update)
        return update + x if self.how.swapped else x + update


class Generated(nn.Module):
    """Patches, tokens of its own at the start and the end, blocks, and a readout."""

    def __init__(self, kind: Kind, spelling: Spelling) -> None:
        super().__init__()
        self.kind = kind
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.first = nn.Parameter(torch.randn(1, kind.start, WIDTH))
        self.last = nn.Parameter(torch.randn(1, kind.end, WIDTH))
        rows = PATCHES if kind.position == "patches" else kind.start + PATCHES + kind.end
        self.positions = nn.Parameter(torch.randn(1, rows, WIDTH))
        self.blocks = nn.ModuleList(Block(kind, spelling) for _ in range(kind.depth))
        self.stem = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(kind.stem))
        self.shared = Bias(kind) if kind.position == "shared bias" else None
        self.final, self.head = make_norm(kind, WIDTH), nn.Linear(WIDTH, 5)
        self.probe = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pool = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.conv = nn.Conv2d(WIDTH, 4, 3, padding=1)

    def forward(self, pixels: Tensor) -> Any:
        x = self.embed(pixels)
        hidden = [x]
        shared = self.shared() if self.shared is not None else None
        for block in self.blocks:
            x = block(x, shared)
            hidden.append(x)
        if self.kind.readout == "bright":
            # How many patches are returned only the image says.
            light = F.avg_pool2d(pixels.mean(1), PATCH).flatten(1)
            return self.head(self.only_patches(self.final(x)))[light > 0]
        if self.kind.readout == "hidden":
            return {"hidden": hidden, "logits": self.head(self.final(x))}
        return self.read(self.final(x))

    def embed(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        for layer in self.stem:  # each token by itself
            x = x + torch.tanh(layer(x))
        if self.kind.position == "patches":
            x = x + self.positions
        parts = [self.first.expand(x.shape[0], -1, -1), x, self.last.expand(x.shape[0], -1, -1)]
        x = torch.cat([part for part in parts if part.shape[1]], dim=1)
        return x + self.positions if self.kind.position == "learned" else x

    def read(self, x: Tensor) -> Any:
        return READERS[self.kind.readout](self, x)

    def only_patches(self, x: Tensor) -> Tensor:
        return x[:, self.kind.start : x.shape[1] - self.kind.end]

    def pooled(self, x: Tensor, *, weights: bool) -> Any:
        probe = self.probe.expand(x.shape[0], -1, -1)
        y, shares = self.pool(probe, x, x, need_weights=weights)
        return (self.head(y[:, 0]), shares) if weights else self.head(y[:, 0])

    def attended(self, x: Tensor) -> Tensor:
        def heads(t: Tensor) -> Tensor:
            return t.view(t.shape[0], -1, HEADS, DEPTH).transpose(1, 2)

        probe = heads(self.probe.expand(x.shape[0], -1, -1))
        y = F.scaled_dot_product_attention(probe, heads(x), heads(x))
        return self.head(y.transpose(1, 2).flatten(1))

    def grid(self, x: Tensor) -> Tensor:
        patches = self.only_patches(x).transpose(1, 2)
        return self.conv(patches.reshape(x.shape[0], WIDTH, GRID, GRID))


READERS: dict[str, Callable[[Generated, Tensor], Any]] = {
    "class": lambda m, x: m.head(x[:, 0]),
    "last": lambda m, x: m.head(x[:, -1]),
    "mean": lambda m, x: m.head(x.mean(1)),
    "patches": lambda m, x: m.head(m.only_patches(x).mean(dim=1)),
    "class and patches": lambda m, x: torch.cat([x[:, 0], m.only_patches(x).mean(1)], dim=-1),
    "dense": lambda m, x: m.head(x),
    "grid": Generated.grid,
    "attention": Generated.attended,
    "multihead": partial(Generated.pooled, weights=False),
    "multihead with weights": partial(Generated.pooled, weights=True),
    "softmax": lambda m, x: m.head((x * m.head(x)[..., :1].softmax(1)).sum(1)),
}


@torch.no_grad()
def without_positions(model: nn.Module) -> nn.Module:
    """The same model with every position term zero: a rotation by zero turns nothing."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "position" in name:
            tensor.zero_()
    return model
