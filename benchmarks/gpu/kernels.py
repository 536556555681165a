"""The Triton kernels alone: are they right on this device, how near to a copy, which attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.gpu.timing import milliseconds, recorded
from tomepass import reference
from tomepass.kernels.gpu.match import match_triton
from tomepass.kernels.gpu.merge import merge_norm_triton, merge_triton, sum_triton, unmerge_triton
from tomepass.kernels.gpu.sources import sources_triton
from tomepass.ops.attending.attend import attend_channel, attend_cudnn, attend_scaled
from tomepass.ops.attending.log_size import log_size
from tomepass.ops.matching.match import match
from tomepass.ops.merging.merge import merge, merge_size
from tomepass.ops.merging.unmerge import unmerge
from tomepass.proof.replay import relative_error

Rows = Iterator[dict[str, Any]]

# Tokens, heads, channels a head, batch, r, protected: of the settings that are measured.
SHAPES = {
    "vit_b": (197, 12, 64, 256, 16, [0]),
    "vit_b, late": (69, 12, 64, 256, 16, [0]),
    "vit_l": (577, 16, 64, 64, 23, [0]),
    "dinov2_l": (1370, 16, 64, 32, 50, [0]),
    "siglip": (729, 16, 72, 64, 24, []),
    "long": (4097, 12, 64, 8, 300, [0]),
}


# Relative to the largest number: of a result, and of the sums before it.
_ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


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
    for name, shape in (TINY if tiny else SHAPES).items():
        yield correct_at(name, shape, dtype, device)


def correct_at(name: str, shape: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """All kernels at one shape, on four images."""
    x, keys, size, r, protected = _operands(shape, dtype, device)
    x, keys, size = x[:4], keys[:4], size[:4]
    wide = keys.float()
    left = x.shape[1] - r
    same = match_triton(wide, r, protected) == match(wide, r, protected)
    assign = match_triton(keys, r, protected)
    narrow = assign == match(keys, r, protected)
    sources = sources_triton(assign, left)
    merged, _ = merge_triton(x, None, size, assign, *sources)
    exact, _ = reference.merge(x.double(), size, assign, left)
    again, _ = merge_triton(x, None, size, assign, *sources)
    alone = merge_triton(x[1:2], None, size[1:2], assign[1:2], *(s[1:2] for s in sources))[0]
    summed = sum_triton(x, size, assign, *sources).double()
    total = merge_size(size, assign, left).double().unsqueeze(-1)
    back = unmerge_triton(merged, assign)
    row = {
        "shape": name,
        "maps of float32 equal": bool(same.all()),
        f"maps of {str(dtype)[6:]} equal": float(narrow.float().mean()),
        "merge, error": relative_error(merged, exact),
        "LayerNorm, error": _error_of_norm(x, size, assign, sources, merged),
        "sum, error": relative_error(summed, exact * total),
        "unmerge equal": bool(torch.equal(back, unmerge(merged, assign, 1))),
        "same bits again": bool(torch.equal(merged, again)),
        "same bits alone": bool(torch.equal(merged[1:2], alone)),
    }
    return row | {"right": right(row, dtype)}


def _error_of_norm(x: Tensor, size: Tensor, assign: Tensor, sources: Any, merged: Tensor) -> float:
    """Of a LayerNorm in the pass of a merge, against one in float64."""
    affine = (torch.rand(x.shape[2]).to(x), torch.rand(x.shape[2]).to(x))
    normed = merge_norm_triton(x, None, size, assign, *sources, *affine, 1e-6)[2].double()
    gain, shift = (a.double() for a in affine)
    return relative_error(normed, F.layer_norm(merged.double(), gain.shape, gain, shift, 1e-6))


def right(row: dict[str, Any], dtype: torch.dtype) -> str:
    """The verdict on a row: all that must be equal is, and errors are those of rounding."""
    equal = all(value for value in row.values() if isinstance(value, bool))
    errors = [value for name, value in row.items() if name.endswith(", error")]
    return "yes" if equal and max(errors) <= _ROUNDING[dtype] else "NO"


def bandwidth(dtype: torch.dtype, rounds: int, device: torch.device, tiny: bool) -> Rows:
    """Microseconds of each kernel, and the share of a plain copy's bandwidth that merging has.

    Each is replayed as a CUDA graph. The cache does not hold all of the buffers, but of the late
    shape.
    """
    for name, shape in (TINY if tiny else SHAPES).items():
        yield _bandwidth(name, shape, dtype, rounds, device)


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
    goal = 0.7
    reached = {"to reach": goal, "reached": "yes" if share >= goal else "NO"}
    return {"shape": name, **found, "merge, of copy": share, **reached}


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

HEADS = {64: 12, 72: 16}
"""Heads by their width: of ViT-B, and of SigLIP so400m."""


def attention(
    width: int, dtype: torch.dtype, rounds: int, device: torch.device, tiny: bool
) -> Rows:
    """Microseconds of each exact path, for ``MEASURED`` in ``tomepass/attention_gpu.py``.

    Paths take turns, each as a CUDA graph.
    """
    for tokens in (17,) if tiny else LENGTHS:
        batch = 2 if tiny else max(256 * 197 // tokens, 8)
        heads = 2 if tiny else HEADS[width]
        yield _attention((batch, tokens, heads, width), dtype, rounds, device)


def _attention(
    shape: tuple[int, int, int, int], dtype: torch.dtype, rounds: int, device: torch.device
) -> dict[str, Any]:
    batch, tokens, _, width = shape
    q, k, v = (torch.randn(shape).to(device, dtype).transpose(1, 2) for _ in range(3))
    size = torch.randint(1, 9, (batch, tokens)).float().to(device)
    torch.compiler.reset()  # Dynamo compiles a function for eight shapes at most
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name, path in PATHS.items():
            found[name] = _compiled(path, (q, k, v, size), device)
        runs = {name: run for name, run in found.items() if callable(run)}
        times = milliseconds(list(runs.values()), rounds, device)
    found |= {n: 1000 * statistics.median(t) for n, t in zip(runs, times, strict=True)}
    fastest = min(runs.keys() - {"without sizes"}, key=found.__getitem__)
    return {"tokens": tokens, "head": width, "batch": batch, **found, "fastest": fastest}


def _compiled(path: Any, operands: Any, device: torch.device) -> Callable[[], Any] | str:
    """A compiled path; the reason's kind where this device or version does not run it."""
    compiled: Any = torch.compile(path, dynamic=False)
    try:
        compiled(*operands)
        return recorded(lambda: compiled(*operands), device)
    except Exception as error:
        reason = str(error).splitlines()[0][:300]
        typer.echo(f"{type(error).__name__} in {path.__name__}: {reason}", err=True)
        return type(error).__name__
