"""timm, torchvision and plain PyTorch encoders, with the newest versions: ``make test-zoo``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from encoders import duplicates
from torch import Tensor, nn
from zoo import relative_error

import tomepass
from tomepass import ToMe, TomeBackend

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

GRID = 8  # patches a side


class External(NamedTuple):
    """How to make a model, its patch size, and what it must read as."""

    make: Callable[[], nn.Module]
    patch: int
    protected: tuple[int, ...]
    lossless: bool = True  # no rotary positions


def of_timm(name: str, patch: int, **changes: Any) -> Callable[[], nn.Module]:
    sizes: dict[str, Any] = {"img_size": GRID * patch, "depth": 3, "embed_dim": 64}
    return lambda: timm.create_model(
        name, pretrained=False, **{**sizes, "num_heads": 4, "num_classes": 7, **changes}
    )


class Plain(nn.Module):
    """Patches and an ``nn.TransformerEncoder``, mean-pooled."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.positions = nn.Parameter(torch.randn(1, GRID * GRID, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(32, 7)

    def forward(self, pixels: Tensor) -> Any:
        x = self.patches(pixels).flatten(2).mT + self.positions
        return self.head(self.encoder(x).mean(1))


def vit_b_16() -> nn.Module:
    return torchvision.models.VisionTransformer(  # type: ignore[no-any-return]
        image_size=64, patch_size=8, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=64
    )


MODELS = {
    "vit": External(of_timm("vit_tiny_patch16_224", 16), 16, (0,)),
    "vit, registers": External(of_timm("vit_small_patch14_reg4_dinov2", 14), 14, (0, 1, 2, 3, 4)),
    "vit, mean": External(
        of_timm("vit_base_patch16_224", 16, global_pool="avg", class_token=False), 16, ()
    ),
    "deit3": External(of_timm("deit3_small_patch16_224", 16), 16, (0,)),
    "eva02": External(of_timm("eva02_tiny_patch14_224", 14), 14, (0,), lossless=False),
    "beit": External(of_timm("beit_base_patch16_224", 16), 16, (0,)),
    "siglip": External(of_timm("vit_so400m_patch14_siglip_224", 14), 14, ()),
    "torchvision": External(vit_b_16, 8, (0,)),
    "TransformerEncoder, post-norm": External(lambda: Plain(norm_first=False), 8, ()),
    "TransformerEncoder, pre-norm": External(lambda: Plain(norm_first=True), 8, ()),
}


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = MODELS[name].make().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            # Heads and biases start at zero here, LayerScale at next to nothing: neither shows
            # what attention does.
            if parameter.ndim > 1:
                fan_in = max(parameter[0].numel(), 8)
                parameter.copy_(torch.randn_like(parameter) * 2 / fan_in**0.5)
            else:
                parameter.clamp_(min=0.3).add_(torch.randn_like(parameter), alpha=0.1)
    return made


def images(name: str) -> Tensor:
    return duplicates(2, patch=MODELS[name].patch, grid=GRID) + torch.randn(
        2, 3, GRID * MODELS[name].patch, GRID * MODELS[name].patch
    )


def test_blocks_and_tokens_are_exact(name: str, model: nn.Module) -> None:
    report = tomepass.explain(model, r=[5, 0, 9], example_inputs=images(name))
    tokens = GRID * GRID + len(MODELS[name].protected)
    assert not report.refused
    assert not report.unmerged
    assert report.protected == MODELS[name].protected
    assert [b.tokens_out for b in report.blocks] == [tokens - 5, tokens - 5, tokens - 14]


@torch.no_grad()
def test_both_doors_agree_and_r_0_is_the_original(name: str, model: nn.Module) -> None:
    x = images(name)
    with_fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it rounds otherwise
    try:
        assert torch.equal(tomepass.apply(model, r=0, example_inputs=x)(x), model(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(with_fast_path)
    ours = tomepass.apply(model, r=8, example_inputs=x)(x)
    assert ours.shape == model(x).shape
    assert relative_error(ours, model(x)) > 1e-4
    for inner in ("eager", "inductor"):
        torch.compiler.reset()
        compiled = torch.compile(model, backend=TomeBackend(ToMe(r=8), inner=inner))(x)
        assert relative_error(compiled, ours) < 1e-4


def test_the_harness_passes_and_is_blind_to_rotary_alone(name: str, model: nn.Module) -> None:
    report = tomepass.check(model, images(name), r=8, inner="eager")
    assert report.ok, str(report)
    (lossless,) = [line for line in report.lines if "lossless" in line.name]
    assert lossless.passed is (True if MODELS[name].lossless else None)
