"""Cases in which the kernels must be right on a device: the longest ones that fit it among them.

A case is a function of the device that raises AssertionError. ``pytest -m cuda`` runs all of
:data:`CASES`; ``python -m benchmarks gpu --only correctness`` runs as many as time allows, without
pytest, and with ``--tiny`` those of :data:`TINY_CASES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import tomepass
from benchmarks.gpu import checks
from benchmarks.gpu.checks import DTYPES, NEXT_TO_NOTHING, check_map
from benchmarks.gpu.operands import counts, even_cosines, heads
from tomepass.handover.added import captured
from tomepass.kernels.gpu import match as gpu_match
from tomepass.kernels.gpu import merge as gpu_merge
from tomepass.kernels.gpu import tuning
from tomepass.kernels.gpu.match import match_triton
from tomepass.kernels.gpu.merge import merge_norm_triton, merge_triton, unmerge_triton
from tomepass.kernels.gpu.sources import sources_triton
from tomepass.ops.matching.match import match

Case = Callable[[str], None]
"""Takes the device: ``"cuda"`` or ``"cpu"``."""

_PROTECTED: tuple[list[int], ...] = ([], [0], [0, 1], [0, 5, 8, 9], [1, 3, 6, 7, 11])


@contextmanager
def exact_products() -> Iterator[None]:
    """The composite operators, which kernels are held against, multiply float32 in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ---- matching ------------------------------------------------------------------------------


def maps_of_float32(tokens: int, device: str) -> None:
    """Equal maps, whatever is protected and however many merge."""
    keys = heads(4, tokens, count=12, width=64, device=device)
    for protected in ([p for p in given if p < tokens] for given in _PROTECTED):
        for r in counts(tokens, protected):
            check_map(keys, r, protected)


def maps_of_heads(count: int, width: int, device: str) -> None:
    """Equal maps for other numbers of heads and channels."""
    for tokens in (60, 197, 400):
        check_map(heads(2, tokens, count=count, width=width, device=device), tokens // 4, [0])


def a_long_sequence(device: str) -> None:
    """Equal maps of 4097 tokens."""
    check_map(heads(2, 4097, count=12, width=64, device=device), 300, [0])


def ties_and_padding(tokens: int, device: str) -> None:
    """Equal maps where cosines tie, where all tokens are equal, and where some are padding."""
    check_map(even_cosines(3, tokens, 0, device=device), tokens // 3, [0])
    same = torch.ones(3, 2, tokens, 16, device=device)
    check_map(same, tokens // 3, [0])
    size = torch.where(torch.rand(3, tokens, device=device) < 0.3, NEXT_TO_NOTHING, 1.0)
    check_map(heads(3, tokens, device=device), tokens // 3, [0], size)


def tokens_without_a_direction(tokens: int, device: str) -> None:
    """Keys that are NaN, infinite or zero merge as the composite operator merges them."""
    keys = heads(2, tokens, device=device)
    keys[:, :, 4], keys[:, :, 5], keys[:, :, 8] = float("nan"), float("inf"), 0.0
    for r in (1, tokens // 3, tokens // 2 - 1):
        check_map(keys, r, [0])
    narrow = match_triton(keys.bfloat16(), 1, [0])
    # One edge of a number is better than none.
    for images in narrow.tolist():
        assert images.count(images[4]) == 1


def maps_of_narrow_dtypes(dtype: torch.dtype, tokens: int, device: str) -> None:
    """The similarity that was kept: as great as the composite's, to the rounding of a product."""
    keys, r = heads(4, tokens, count=12, width=64, dtype=dtype, device=device), tokens // 4
    ours, theirs = match_triton(keys, r, [0]), match(keys, r, [0])
    assert (ours == theirs).float().mean() > 0.9
    metric = nn.functional.normalize(keys.double().mean(1), dim=-1)

    def kept(assign: Tensor) -> Tensor:
        together = assign.unsqueeze(1) == assign.unsqueeze(2)
        odd = torch.arange(tokens, device=device) % 2 == 1
        pairs = together & odd[None, None, :] & ~odd[None, :, None]
        return ((metric @ metric.transpose(1, 2)) * pairs).sum((1, 2))

    torch.testing.assert_close(kept(ours), kept(theirs), rtol=1e-5, atol=0)


# ---- merging -------------------------------------------------------------------------------


def merged_tokens(width: int, dtype: torch.dtype, device: str) -> None:
    """Merged tokens equal the reference's."""
    for tokens, left in ((197, 181), (64, 3), (5, 5)):
        checks.check_merge(3, tokens, left, width, dtype, device)


def any_strides(device: str) -> None:
    """Maps and tokens of any strides."""
    checks.check_strided_keys(device)
    checks.check_strided_tokens(device)


def sums_and_layer_norms(dtype: torch.dtype, device: str) -> None:
    """Weighted sums, and LayerNorms in the pass of a merge, equal the reference's."""
    checks.check_sums(dtype, device)
    for width in (20, 768, 1152):
        checks.check_norm(width, dtype, device)


def gradients_of_kernels(dtype: torch.dtype, device: str) -> None:
    """Gradients are those of the composite operators in float64."""
    checks.check_gradients(dtype, device)
    checks.check_norm_gradients(dtype, dtype, device)
    checks.check_norm_gradients(torch.float32, torch.bfloat16, device)  # under autocast


def bit_by_bit(dtype: torch.dtype, device: str) -> None:
    """A token by itself, and equal ones, stay as they are: on a device a size divided by itself
    need not be 1."""
    x = torch.randn(3, 197, 768, device=device).to(dtype)
    size = torch.randint(1, 4000, (3, 197), device=device).float()
    assign = torch.rand(3, 197, device=device).argsort(1)
    merged, _ = merge_triton(x, None, size, assign, *sources_triton(assign, 197))
    assert torch.equal(unmerge_triton(merged, assign), x)
    pairs, halves = x[:, :98].repeat_interleave(2, 1), torch.arange(196, device=device) // 2
    halves = halves.repeat(3, 1)
    merged, _ = merge_triton(pairs, None, size[:, :196], halves, *sources_triton(halves, 98))
    assert torch.equal(merged, x[:, :98])


def more_numbers_than_32_bits_count(device: str) -> None:
    """Offsets are of 64 bits."""
    x = torch.zeros(2900, 1024, 768, dtype=torch.float16, device=device)
    x[-1] = torch.randn(1024, 768, device=device).half()
    assign = torch.arange(1024, device=device).repeat(2900, 1) // 2
    merged, _ = merge_triton(x, None, None, assign, *sources_triton(assign, 512))
    torch.testing.assert_close(merged[-1], x[-1].view(512, 2, 768).float().mean(1).half())
    assert not merged[:-1].any()


# ---- the same bits -------------------------------------------------------------------------


def every_configuration(dtype: torch.dtype, device: str) -> None:
    """Whichever configuration of a kernel is fastest, the bits are the same."""
    found: dict[Any, list[list[Tensor]]] = {}
    for place in range(5):

        def one(kind: Any, configurations: Any, run: Any, device: Any, place: int = place) -> None:
            run(configurations[place % len(configurations)])

        with (
            patch.object(gpu_match, "run_fastest", one),
            patch.object(gpu_merge, "run_fastest", one),
        ):
            for tokens, width in ((40, 64), (197, 384), (197, 768), (577, 1024), (300, 1152)):
                results = _everything(tokens, width, dtype, device)
                found.setdefault((tokens, width), []).append(results)
    for first, *others in found.values():
        assert all(_equal(first, other) for other in others)


def again_and_alone(device: str) -> None:
    """The same bits on every run, and for an image without its neighbours."""
    first, again = (_everything(197, 768, torch.bfloat16, device) for _ in range(2))
    assert _equal(first, again)
    alone = _everything(197, 768, torch.bfloat16, device, slice(1, 2))
    assert _equal([a[1:2] for a in first], alone)


def a_choice_is_kept(device: str) -> None:
    """A configuration is timed once a kind of shape."""
    _everything(197, 768, torch.bfloat16, device)
    assert tuning._CHOSEN
    before = dict(tuning._CHOSEN)
    _everything(197, 768, torch.bfloat16, device)
    assert before == tuning._CHOSEN


def _everything(
    tokens: int, width: int, dtype: torch.dtype, device: str, images: slice = slice(None)
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys = heads(3, tokens, count=width // 64, width=64, dtype=dtype, device=device)[images]
    x = torch.randn(3, tokens, width, generator=generator).to(device, dtype)[images]
    weight, bias = (torch.rand(width, generator=generator).to(device, dtype) for _ in range(2))
    assign = match_triton(keys, tokens // 4, [0])
    sources = sources_triton(assign, tokens - tokens // 4)
    made = merge_norm_triton(x, x, None, assign, *sources, weight, bias, 1e-6)
    return [assign, *sources, *made, unmerge_triton(made[0], assign)]


def _equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- whole models --------------------------------------------------------------------------


def gradients_of_a_model(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Through the kernels and through the composite operators, and twice to the bit."""
    model.requires_grad_(True)
    applied = captured(tomepass.apply(model, r=4), dict(inputs))

    def gradients(graph: Any) -> list[Tensor]:
        model.zero_grad()
        values = applied.run(model, list(inputs.values()), graph)
        torch.cat([v.flatten() for v in values]).square().sum().backward()  # type: ignore[no-untyped-call]
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    ours = gradients(applied.on_device)
    for got, expected in zip(ours, gradients(applied.graph), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    assert _equal(ours, gradients(applied.on_device))


def gradients_under_autocast(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Through the kernels and through the composite operators, in bfloat16."""
    model.requires_grad_(True)
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16):
        applied = captured(tomepass.apply(model, r=4), dict(inputs))

    def gradients(graph: Any) -> Tensor:
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            values = applied.run(model, list(inputs.values()), graph)
        loss = torch.cat([v.float().flatten() for v in values]).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    ours, theirs = gradients(applied.on_device), gradients(applied.graph)
    assert ours.isfinite().all()
    assert nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99


@torch.no_grad()
def cuda_graphs_replay(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """A recorded CUDA graph answers other images rightly."""
    merged = tomepass.apply(model, r=4, example_inputs=dict(inputs))
    compiled: Any = torch.compile(merged, mode="reduce-overhead")
    for seed in range(6):
        torch.manual_seed(seed)
        inputs = {name: torch.randn_like(value) for name, value in inputs.items()}
        got = _first(compiled(**inputs)).clone()
        torch.testing.assert_close(got, _first(merged(**inputs)), rtol=1e-3, atol=1e-4)


def check_passes(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Every line of :func:`tomepass.check`."""
    report = tomepass.check(model, dict(inputs), r=4)
    assert report.ok, str(report)


def _first(output: Any) -> Tensor:
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


# ---- all of them ---------------------------------------------------------------------------


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _every_case() -> Iterator[tuple[str, Case]]:
    """What would break most first: a borrowed device may not be there for all of them."""
    lengths = (197, 577, 256, 257, 4, 17, 64, 133, 196, 729, 1370)
    for tokens in lengths[:2]:
        yield f"maps of float32, {tokens} tokens", partial(maps_of_float32, tokens)
    for dtype in DTYPES:
        yield f"merged tokens, {_named(dtype)}, 768", partial(merged_tokens, 768, dtype)
        yield f"sums and layer norms, {_named(dtype)}", partial(sums_and_layer_norms, dtype)
        yield f"bit by bit, {_named(dtype)}", partial(bit_by_bit, dtype)
        yield f"gradients, {_named(dtype)}", partial(gradients_of_kernels, dtype)
    for dtype in DTYPES[1:]:
        for tokens in (197, 577):
            name = f"maps of {_named(dtype)}, {tokens} tokens"
            yield name, partial(maps_of_narrow_dtypes, dtype, tokens)
    yield "the same bits again and alone", again_and_alone
    yield "any strides", any_strides
    for tokens in (197, 577):
        yield f"ties and padding, {tokens} tokens", partial(ties_and_padding, tokens)
    for tokens in (60, 300):
        name = f"tokens without a direction, {tokens} tokens"
        yield name, partial(tokens_without_a_direction, tokens)
    yield "a choice is kept", a_choice_is_kept
    for tokens in lengths[2:]:
        yield f"maps of float32, {tokens} tokens", partial(maps_of_float32, tokens)
    for count, width in ((3, 24), (16, 72), (16, 80), (4, 128), (2, 256)):
        yield f"maps of {count} heads of {width}", partial(maps_of_heads, count, width)
    yield "a long sequence of 4097 tokens", a_long_sequence
    for dtype in DTYPES:
        for wide in (7, 192, 384, 1024, 1152, 1280):
            yield f"merged tokens, {_named(dtype)}, {wide}", partial(merged_tokens, wide, dtype)
    for dtype in DTYPES:
        yield f"every configuration, {_named(dtype)}", partial(every_configuration, dtype)
    yield "more numbers than 32 bits count", more_numbers_than_32_bits_count
    yield "operators are registered", checks.check_registrations


CASES: Mapping[str, Case] = dict(_every_case())

TINY_CASES: Mapping[str, Case] = {
    "maps of float32, 17 tokens": lambda device: check_map(heads(2, 17, device=device), 5, [0]),
    "merged tokens, float32": lambda device: checks.check_merge(
        2, 13, 7, 12, torch.float32, device
    ),
    "layer norms, float32": lambda device: checks.check_norm(20, torch.float32, device),
    "gradients, float32": lambda device: checks.check_gradients(torch.float32, device),
}
"""For Triton's interpreter, where a token takes milliseconds."""
