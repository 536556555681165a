"""A budget for each image, by how redundant it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import make_inputs, make_vit, relative_error

import tomepass
from tomepass import EViT, Prune, ToMe, TomeBackend, TomeError
from tomepass.handover.adaptive import BUDGETS, AdaptiveModel
from tomepass.handover.router import redundancy
from tomepass.measuring.measure import measure
from tomepass.methods import DynamicViT, Method, method_from_dict

pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Twelve images, each smoother than the one before."""
    pixels = make_inputs("vit", 12)["pixel_values"]
    smooth = pixels.mean((2, 3), keepdim=True)
    weight = torch.linspace(0, 0.9, 12).view(-1, 1, 1, 1)
    return pixels * (1 - weight) + smooth * weight


@pytest.fixture(scope="module")
def model() -> Any:
    return make_vit()


@pytest.fixture(scope="module")
def adaptive(model: Any, images: Tensor) -> AdaptiveModel:
    return tomepass.apply(model, ToMe(10, adaptive=True), example_inputs=images)


def test_redundancy_is_the_mean_cosine_with_the_nearest_other() -> None:
    x = torch.tensor([[[9.0, 9], [1, 0], [1, 1], [0, 2]]])
    near = 2**-0.5
    assert redundancy(x, (0,)) == pytest.approx((near + near + near) / 3)


@torch.no_grad()
def test_images_are_split_evenly_and_keep_their_order(
    adaptive: AdaptiveModel, model: Any, images: Tensor
) -> None:
    routes = adaptive.routes(images)
    assert torch.bincount(routes).tolist() == [4, 4, 4]
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(adaptive.routes(images[shuffled]), routes[shuffled])
    ours = adaptive(images[shuffled]).logits
    for number, budget in enumerate(adaptive.budgets):
        mine = routes[shuffled] == number
        alone = budget(images[shuffled][mine]).logits
        assert relative_error(ours[mine], alone) < 1e-5


def test_routing_runs_nothing_but_the_embedding(adaptive: AdaptiveModel) -> None:
    (applied, *_) = adaptive._captures
    nodes = applied.router.graph.graph.nodes
    attention = torch.ops.aten.scaled_dot_product_attention.default
    assert not [node for node in nodes if node.target == attention]


@torch.no_grad()
def test_the_budgets_are_shares_of_the_counts(adaptive: AdaptiveModel, images: Tensor) -> None:
    counts = [
        [block.r for block in budget.captured(images).report.blocks] for budget in adaptive.budgets
    ]
    assert [c[0] for c in counts] == [round(10 * share) for share in BUDGETS]


@torch.no_grad()
def test_a_result_does_not_depend_on_its_neighbours(
    adaptive: AdaptiveModel, images: Tensor
) -> None:
    whole = adaptive(images).logits
    for i in (0, 5, 11):
        assert relative_error(adaptive(images[i : i + 1]).logits, whole[i : i + 1]) < 1e-5


@pytest.mark.deep
@pytest.mark.parametrize("method", [Prune(20, adaptive=True), EViT(adaptive=True)])
@torch.no_grad()
def test_it_takes_counts_and_rates(method: Method, model: Any, images: Tensor) -> None:
    found = tomepass.apply(model, method, example_inputs=images)
    assert found(images).logits.shape == (12, 10)
    assert len({budget.method for budget in found.budgets}) == 3


@pytest.mark.deep
@torch.no_grad()
def test_compiled_is_eager(adaptive: AdaptiveModel, model: Any, images: Tensor) -> None:
    fast = tomepass.apply(model, adaptive.method, example_inputs=images)
    fast.compile(backend="eager")
    for batch in (images, images[3:4]):
        assert relative_error(fast(batch).logits, adaptive(batch).logits) < 1e-4


def test_thresholds_are_part_of_the_method(adaptive: AdaptiveModel) -> None:
    method = adaptive.method
    assert isinstance(method.adaptive, tuple)
    assert method_from_dict(method.to_dict()) == method


def test_doors_that_are_about_one_graph_refuse_an_adaptive_method(
    model: Any, images: Tensor
) -> None:
    method = ToMe(8, adaptive=(0.1, 0.2))
    doors: dict[str, Callable[[], Any]] = {
        "explain": lambda: tomepass.explain(model, method, example_inputs=images),
        "check": lambda: tomepass.check(model, images, method, inner="eager"),
        "measure": lambda: measure(model, images, method, inner="eager"),
    }
    for door, call in doors.items():
        with pytest.raises(TomeError, match=rf"adaptive=\(0.1, 0.2\) routes .*, {door} is"):
            call()
    with pytest.raises(TomeError, match="routes images to several graphs"):
        tomepass.export(model, method, example_inputs=images)


def test_an_adaptive_model_is_no_model_to_merge(adaptive: AdaptiveModel, images: Tensor) -> None:
    doors: list[Callable[[Any], Any]] = [
        lambda model: tomepass.apply(model, r=2, example_inputs=images),
        lambda model: tomepass.explain(model, r=2, example_inputs=images),
        lambda model: tomepass.check(model, images, r=2, inner="eager"),
        lambda model: tomepass.calibrate(model, [images], macs=0.8, progress=False),
        lambda model: tomepass.train_policy(model, DynamicViT(), [images], progress=False),
        lambda model: measure(model, images, r=2, inner="eager"),
    ]
    for door in doors:
        with pytest.raises(TomeError, match=r"already merged with ToMe.* several graphs"):
            door(adaptive)


def test_what_it_cannot_do_is_refused(model: Any, images: Tensor) -> None:
    with pytest.raises(TomeError, match="give example_inputs=: a batch of real images"):
        tomepass.apply(model, ToMe(8, adaptive=True))
    with pytest.raises(TomeError, match="which hold 2"):
        tomepass.apply(model, ToMe(8, adaptive=True), example_inputs=images[:2])
    with pytest.raises(TomeError, match="adaptive is not available"):
        TomeBackend(ToMe(8, adaptive=True))
    with pytest.raises(ValueError, match="trace_source=True and adaptive"):
        ToMe(8, adaptive=True, trace_source=True)
    with pytest.raises(ValueError, match="outputs='merged' and adaptive"):
        tomepass.apply(model, ToMe(8, adaptive=True), example_inputs=images, outputs="merged")
    with pytest.raises(ValueError, match="two rising thresholds"):
        ToMe(8, adaptive=(0.5, 0.2))
    with pytest.raises(TypeError, match="adaptive must be"):
        ToMe(8, adaptive=3)  # type: ignore[arg-type]


@torch.no_grad()
def test_the_more_redundant_an_image_the_more_it_loses() -> None:
    noise, plain = torch.randn(3, 3, 32, 32), torch.randn(3, 3, 1, 1).expand(-1, -1, 32, 32)
    between = torch.cat([noise[..., :16], plain[..., 16:]], dim=-1)
    images = torch.cat([plain, noise, between])
    model = make_vit(num_hidden_layers=1)
    merged = tomepass.apply(model, ToMe(4, adaptive=True), example_inputs=images)
    assert merged.routes(images).tolist() == [2] * 3 + [0] * 3 + [1] * 3
