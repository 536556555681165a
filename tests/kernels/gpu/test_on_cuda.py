"""All kernels on a device: ``pytest -m cuda``. No network, no data folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import make_inputs, make_model

import tomepass
from tests.kernels.gpu.gpu_cases import (
    DTYPES,
    NEXT_TO_NOTHING,
    check_gradients,
    check_map,
    check_merge,
    check_norm,
    check_norm_gradients,
    check_registrations,
    check_strided_keys,
    check_strided_tokens,
    check_sums,
    counts,
    even_cosines,
    heads,
)
from tomepass.kernels.gpu import match as gpu_match
from tomepass.kernels.gpu import merge as gpu_merge
from tomepass.kernels.gpu import tuning
from tomepass.kernels.gpu.match import match_triton
from tomepass.kernels.gpu.merge import merge_norm_triton, merge_triton, unmerge_triton
from tomepass.kernels.gpu.sources import sources_triton
from tomepass.ops.matching.match import match

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """The composite operators multiply float32 in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("tokens", [4, 17, 64, 133, 196, 197, 256, 257, 577, 729, 1370])
@pytest.mark.parametrize("protected", [[], [0], [0, 1], [0, 5, 8, 9], [1, 3, 6, 7, 11]], ids=str)
def test_maps_of_float32_equal_the_composite_s(tokens: int, protected: list[int]) -> None:
    protected = [p for p in protected if p < tokens]
    keys = heads(4, tokens, count=12, width=64, device="cuda")
    for r in counts(tokens, protected):
        check_map(keys, r, protected)


@pytest.mark.parametrize(("count", "width"), [(3, 24), (16, 72), (16, 80), (4, 128), (2, 256)])
def test_maps_of_other_heads(count: int, width: int) -> None:
    for tokens in (60, 197, 400):
        check_map(heads(2, tokens, count=count, width=width, device="cuda"), tokens // 4, [0])


def test_a_long_sequence() -> None:
    check_map(heads(2, 4097, count=12, width=64, device="cuda"), 300, [0])


@pytest.mark.parametrize("tokens", [197, 577])
def test_ties_and_padding_on_the_device(tokens: int) -> None:
    check_map(even_cosines(3, tokens, 0, device="cuda"), tokens // 3, [0])
    same = torch.ones(3, 2, tokens, 16, device="cuda")
    check_map(same, tokens // 3, [0])
    size = torch.where(torch.rand(3, tokens, device="cuda") < 0.3, NEXT_TO_NOTHING, 1.0)
    check_map(heads(3, tokens, device="cuda"), tokens // 3, [0], size)


@pytest.mark.parametrize("tokens", [60, 300])
def test_tokens_without_a_direction_on_the_device(tokens: int) -> None:
    keys = heads(2, tokens, device="cuda")
    keys[:, :, 4], keys[:, :, 5], keys[:, :, 8] = float("nan"), float("inf"), 0.0
    for r in (1, tokens // 3, tokens // 2 - 1):
        check_map(keys, r, [0])
    narrow = match_triton(keys.bfloat16(), 1, [0])
    # One edge of a number is better than none.
    for images in narrow.tolist():
        assert images.count(images[4]) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [197, 577])
def test_maps_of_narrow_dtypes_lose_next_to_nothing(dtype: torch.dtype, tokens: int) -> None:
    """The similarity that was kept: as great as the composite's, to the rounding of a product."""
    keys, r = heads(4, tokens, count=12, width=64, dtype=dtype, device="cuda"), tokens // 4
    ours, theirs = match_triton(keys, r, [0]), match(keys, r, [0])
    assert (ours == theirs).float().mean() > 0.9
    metric = torch.nn.functional.normalize(keys.double().mean(1), dim=-1)

    def kept(assign: Tensor) -> Tensor:
        together = assign.unsqueeze(1) == assign.unsqueeze(2)
        odd = torch.arange(tokens, device="cuda") % 2 == 1
        pairs = together & odd[None, None, :] & ~odd[None, :, None]
        return ((metric @ metric.transpose(1, 2)) * pairs).sum((1, 2))

    torch.testing.assert_close(kept(ours), kept(theirs), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 192, 384, 768, 1024, 1152, 1280])
def test_merged_tokens_equal_the_reference(width: int, dtype: torch.dtype) -> None:
    for tokens, left in ((197, 181), (64, 3), (5, 5)):
        check_merge(3, tokens, left, width, dtype, "cuda")


def test_maps_and_tokens_of_any_strides() -> None:
    check_strided_keys("cuda")
    check_strided_tokens("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_and_layer_norms_equal_the_reference(dtype: torch.dtype) -> None:
    check_sums(dtype, "cuda")
    for width in (20, 768, 1152):
        check_norm(width, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_composite_in_float64(dtype: torch.dtype) -> None:
    check_gradients(dtype, "cuda")
    check_norm_gradients(dtype, dtype, "cuda")
    check_norm_gradients(torch.float32, torch.bfloat16, "cuda")  # under autocast


def test_operators_are_registered_as_torch_expects() -> None:
    check_registrations("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_by_itself_and_equal_ones_stay_bit_by_bit(dtype: torch.dtype) -> None:
    """Sizes divided by themselves need not be 1 on a device."""
    x = torch.randn(3, 197, 768, device="cuda").to(dtype)
    size = torch.randint(1, 4000, (3, 197), device="cuda").float()
    assign = torch.rand(3, 197, device="cuda").argsort(1)
    merged, _ = merge_triton(x, None, size, assign, *sources_triton(assign, 197))
    assert torch.equal(unmerge_triton(merged, assign), x)
    pairs, halves = x[:, :98].repeat_interleave(2, 1), torch.arange(196, device="cuda") // 2
    halves = halves.repeat(3, 1)
    merged, _ = merge_triton(pairs, None, size[:, :196], halves, *sources_triton(halves, 98))
    assert torch.equal(merged, x[:, :98])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_in_every_configuration(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[Any, list[Tensor]] = {}
    for place in range(5):

        def one(kind: Any, configurations: Any, run: Any, device: Any, place: int = place) -> None:
            run(configurations[place % len(configurations)])

        monkeypatch.setattr(gpu_match, "run_fastest", one)
        monkeypatch.setattr(gpu_merge, "run_fastest", one)
        for tokens, width in ((40, 64), (197, 384), (197, 768), (577, 1024), (300, 1152)):
            found.setdefault((tokens, width), []).append(_everything(tokens, width, dtype))
    for results in found.values():
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_same_bits_again_and_alone() -> None:
    first, again = (_everything(197, 768, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    alone = _everything(197, 768, torch.bfloat16, slice(1, 2))
    assert all(torch.equal(a[1:2], b) for a, b in zip(first, alone, strict=True))


def _everything(
    tokens: int, width: int, dtype: torch.dtype, images: slice = slice(None)
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys = heads(3, tokens, count=width // 64, width=64, dtype=dtype, device="cuda")[images]
    x = torch.randn(3, tokens, width, generator=generator).to("cuda", dtype)[images]
    affine = (torch.rand(width, generator=generator).to("cuda", dtype) for _ in range(2))
    assign = match_triton(keys, tokens // 4, [0])
    sources = sources_triton(assign, tokens - tokens // 4)
    made = merge_norm_triton(x, x, None, assign, *sources, *affine, 1e-6)
    return [assign, *sources, *made, unmerge_triton(made[0], assign)]


def test_more_numbers_than_32_bits_count() -> None:
    x = torch.zeros(2900, 1024, 768, dtype=torch.float16, device="cuda")
    x[-1] = torch.randn(1024, 768, device="cuda").half()
    assign = torch.arange(1024, device="cuda").repeat(2900, 1) // 2
    merged, _ = merge_triton(x, None, None, assign, *sources_triton(assign, 512))
    torch.testing.assert_close(merged[-1], x[-1].view(512, 2, 768).float().mean(1).half())
    assert not merged[:-1].any()


def test_gradients_are_the_composite_s() -> None:
    model = make_model("vit").cuda().requires_grad_(True)
    inputs = {name: value.cuda() for name, value in make_inputs("vit").items()}
    applied = tomepass.apply(model, r=4).captured(inputs)
    leaves = list(inputs.values())

    def gradients(graph: Any) -> list[Tensor]:
        model.zero_grad()
        torch.cat(
            [v.flatten() for v in applied.run(model, leaves, graph)]
        ).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    ours = gradients(applied.on_device)
    for got, expected in zip(ours, gradients(applied.graph), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    again = gradients(applied.on_device)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@torch.no_grad()
def test_cuda_graphs_replay_on_other_images() -> None:
    model = make_model("vit").to("cuda")
    inputs = {name: value.cuda() for name, value in make_inputs("vit", 3).items()}
    merged = tomepass.apply(model, r=4, example_inputs=inputs)
    compiled = torch.compile(merged, mode="reduce-overhead")
    for seed in range(6):
        torch.manual_seed(seed)
        inputs = {name: torch.randn_like(value) for name, value in inputs.items()}
        got = _first(compiled(**inputs)).clone()
        torch.testing.assert_close(got, _first(merged(**inputs)), rtol=1e-3, atol=1e-4)


def test_under_autocast_gradients_are_the_composite_s() -> None:
    model = make_model("vit").cuda().requires_grad_(True)
    inputs = {name: value.cuda() for name, value in make_inputs("vit").items()}
    with torch.autocast("cuda", torch.bfloat16):
        applied = tomepass.apply(model, r=4).captured(inputs)
    leaves = list(inputs.values())

    def gradients(graph: Any) -> Tensor:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            values = applied.run(model, leaves, graph)
        torch.cat([v.float().flatten() for v in values]).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    ours, theirs = gradients(applied.on_device), gradients(applied.graph)
    assert ours.isfinite().all()
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("name", ["vit", "dinov2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_harness_passes_on_the_device(name: str, dtype: torch.dtype) -> None:
    model = make_model(name).to("cuda", dtype)
    inputs = {
        key: value.to("cuda", dtype if value.is_floating_point() else value.dtype)
        for key, value in make_inputs(name, 3).items()
    }
    report = tomepass.check(model, inputs, r=4)
    assert report.ok, str(report)


def test_a_choice_is_kept() -> None:
    _everything(197, 768, torch.bfloat16)
    assert tuning._CHOSEN
    before = dict(tuning._CHOSEN)
    _everything(197, 768, torch.bfloat16)
    assert before == tuning._CHOSEN
