"""The Triton kernels alone: are they right on this device, how near to a copy, which attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.gpu_timing import milliseconds, recorded
from tomepass import reference
from tomepass.kernels.gpu_match import match_triton
from tomepass.kernels.gpu_merge import (
    merge_norm_triton,
    merge_triton,
    sources_triton,
    unmerge_triton,
)
from tomepass.ops.attend import attend_channel, attend_cudnn, attend_scaled
from tomepass.ops.log_size import log_size
from tomepass.ops.match import match
from tomepass.ops.merge import merge

Rows = list[dict[str, Any]]

# Tokens, heads, channels a head, batch, r, protected: of the settings that are measured.
SHAPES = {
    "vit_b": (197, 12, 64, 256, 16, [0]),
    "vit_b, late": (69, 12, 64, 256, 16, [0]),
    "vit_l": (577, 16, 64, 64, 23, [0]),
    "dinov2_l": (1370, 16, 64, 32, 50, [0]),
    "siglip": (729, 16, 72, 64, 24, []),
    "long": (4097, 12, 64, 8, 300, [0]),
}
TINY = {"tiny": (33, 2, 16, 2, 5, [0])}


def _operands(shape: Any, dtype: torch.dtype, device: torch.device) -> Any:
    tokens, heads, width, batch, r, protected = shape
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, heads * width).to(device, dtype)
    keys = torch.randn(batch, tokens, heads, width).to(device, dtype).transpose(1, 2)
    size = torch.randint(1, 9, (batch, tokens)).float().to(device)
    return x, keys, size, r, protected


def correct(dtype: torch.dtype, device: torch.device, tiny: bool) -> Rows:
    """Each kernel against the composite operator, or float64, and against itself."""
    rows = []
    for name, shape in (TINY if tiny else SHAPES).items():
        x, keys, size, r, protected = _operands(shape, dtype, device)
        x, keys, size = x[:4], keys[:4], size[:4]
        wide = keys.float()
        left = x.shape[1] - r
        same = match_triton(wide, r, protected) == match(wide, r, protected)
        narrow = match_triton(keys, r, protected) == match(keys, r, protected)
        assign = match_triton(keys, r, protected)
        sources = sources_triton(assign, left)
        merged, _ = merge_triton(x, None, size, assign, *sources)
        exact, _ = reference.merge(x.double(), size, assign, left)
        again, _ = merge_triton(x, None, size, assign, *sources)
        alone = merge_triton(x[1:2], None, size[1:2], assign[1:2], *(s[1:2] for s in sources))[0]
        rows.append(
            {
                "shape": name,
                "maps of float32 equal": bool(same.all()),
                f"maps of {str(dtype)[6:]} equal": float(narrow.float().mean()),
                "merge, error": float((merged.double() - exact).abs().max() / x.abs().max()),
                "same bits again": bool(torch.equal(merged, again)),
                "same bits alone": bool(torch.equal(merged[1:2], alone)),
            }
        )
    return rows


def bandwidth(dtype: torch.dtype, rounds: int, device: torch.device, tiny: bool) -> Rows:
    """Microseconds of each kernel, and the share of a plain copy's bandwidth that merging has.

    Each is replayed as a CUDA graph over buffers that the cache does not hold all of.
    """
    shapes = TINY if tiny else SHAPES
    return [_bandwidth(name, shape, dtype, rounds, device) for name, shape in shapes.items()]


def _bandwidth(
    name: str, shape: Any, dtype: torch.dtype, rounds: int, device: torch.device
) -> dict[str, Any]:
    x, keys, size, r, protected = _operands(shape, dtype, device)
    left = x.shape[1] - r
    assign = match_triton(keys, r, protected)
    sources = sources_triton(assign, left)
    affine = (torch.ones(x.shape[2]).to(x), torch.zeros(x.shape[2]).to(x))
    rest = (size, assign, *sources)
    short = merge_triton(x, None, *rest)[0]
    target, other = torch.empty_like(x), torch.empty_like(keys)
    runs: dict[str, Callable[[], Any]] = {
        "copy of x": lambda: target.copy_(x),
        "merge": lambda: merge_triton(x, None, *rest),
        "add and merge": lambda: merge_triton(x, x, *rest),
        "merge and LayerNorm": lambda: merge_norm_triton(x, None, *rest, *affine, 1e-6),
        "sources": lambda: sources_triton(assign, left),
        "unmerge": lambda: unmerge_triton(short, assign),
        "copy of keys": lambda: other.copy_(keys),
        "match": lambda: match_triton(keys, r, protected),
        "merge, composite": lambda: merge(x, size, assign, left),
    }
    with torch.no_grad():
        replays = [recorded(run, device) for run in runs.values()]
        times = [statistics.median(t) for t in milliseconds(replays, rounds, device)]
    found = dict(zip(runs, (1000 * t for t in times), strict=True))
    copied, moved = 2 * x.numel(), x.numel() + short.numel()
    share = moved / found["merge"] / (copied / found["copy of x"])
    return {"shape": name, **found, "merge, of copy": share, "to reach": 0.7}


# ---- attention -----------------------------------------------------------------------------


def without_sizes(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    """What it costs where nothing has merged: not exact after a merge."""
    return F.scaled_dot_product_attention(q, k, v)


def bias(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    """log(size) as a bias, by whatever kernel PyTorch takes."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=log_size(size, q))


def flex(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    """FlexAttention, log(size) added to each score."""
    log = size.log()

    def weighed(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + log[b, j]

    attended: Tensor = flex_attention(q, k, v, score_mod=weighed)
    return attended


PATHS: dict[str, Any] = {
    "without sizes": without_sizes,
    "bias": bias,
    "channel": attend_channel,
    "scaled": attend_scaled,
    "cudnn": attend_cudnn,
    "flex": flex,
}
LENGTHS = (197, 181, 133, 69, 37, 577, 369, 729, 1370, 4097)


def attention(dtype: torch.dtype, rounds: int, device: torch.device, tiny: bool) -> Rows:
    """Microseconds of each exact path, for ``MEASURED`` in ``tomepass/attention_gpu.py``."""
    rows = []
    shapes = [(17, 2, 16, 2)] if tiny else []
    for tokens in () if tiny else LENGTHS:
        batch = max(256 * 197 // tokens, 8)
        shapes += [(tokens, 12, 64, batch), (tokens, 16, 72, batch)]
    for tokens, heads, width, batch in shapes:
        q, k, v = (
            torch.randn(batch, tokens, heads, width).to(device, dtype).transpose(1, 2)
            for _ in range(3)
        )
        size = torch.randint(1, 9, (batch, tokens)).float().to(device)
        row: dict[str, Any] = {"tokens": tokens, "head": width, "batch": batch}
        for name, path in PATHS.items():
            row[name] = _microseconds(path, (q, k, v, size), rounds, device)
        exact = [n for n in PATHS if n != "without sizes" and isinstance(row[n], float)]
        row["fastest"] = min(exact, key=lambda name, row=row: row[name])  # type: ignore[misc]
        rows.append(row)
    return rows


def _microseconds(path: Any, operands: Any, rounds: int, device: torch.device) -> float | str:
    """Of a compiled path; the reason's kind where this device or version does not run it."""
    torch.compiler.reset()
    compiled: Any = torch.compile(path, dynamic=False)
    try:
        with torch.no_grad():
            compiled(*operands)
            (times,) = milliseconds([lambda: compiled(*operands)], rounds, device)
    except Exception as error:
        return type(error).__name__
    return 1000 * statistics.median(times)
