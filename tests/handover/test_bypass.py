"""Methods that are not forward: merged, or a warning says that they are not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from depth import at_hand
from encoders import Causal, Encoder, make, near, pixels
from torch import Tensor, nn
from zoo import relative_error

import tomepass
from tomepass import ToMe, TomeError
from tomepass.handover.standing_in.bypass import called_through

METHOD = ToMe([6, 4])


class Timm(Encoder):
    """Spelled as timm's models are: features and a head, the forward calls both."""

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.final(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x[:, 0]
        return pooled if pre_logits else self.head(pooled)

    def forward(self, pixels: Tensor) -> Any:
        return self.forward_head(self.forward_features(pixels))

    def embedding(self, x: Tensor) -> Tensor:
        """Calls another method that bypasses the forward."""
        return self.forward_head(self.forward_features(x), pre_logits=True)


class Sentences(Encoder):
    """Spelled as sentence-transformers are: lists go in, batches are made within."""

    def encode(self, images: list[Any], batch_size: int = 2) -> Tensor:
        batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
        return torch.cat([self(torch.stack(batch)) for batch in batches])

    def encode_by_forward(self, images: list[Any]) -> Tensor:
        return self.forward(torch.stack(images))  # type: ignore[no-any-return]

    def encode_beside(self, images: list[Any]) -> Tensor:
        x = self.embed(torch.stack([torch.from_numpy(image) for image in images]))
        for block in self.blocks:
            x = block(x)
        return x.mean(1)

    def probabilities(self, pixels: Tensor) -> Tensor:
        return self(pixels)[:, None].softmax(-1)  # type: ignore[no-any-return]

    def sizes(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def generate(self, pixels: Tensor, cache: Any = None) -> Tensor:
        return self.step(pixels, cache or object())

    def step(self, pixels: Tensor, cache: Any) -> Tensor:
        return self(pixels, cache)  # type: ignore[no-any-return]

    def forward(self, pixels: Tensor, cache: Any = None) -> Any:
        return super().forward(pixels)


@pytest.fixture(scope="module")
def timm() -> Any:
    return make(Timm)


@pytest.fixture(scope="module")
def sentences() -> tuple[Any, Any]:
    model = make(Sentences)
    return model, tomepass.apply(model, METHOD, example_inputs=pixels())


@pytest.fixture(autouse=True)
def _loud() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@torch.no_grad()
def test_a_method_that_attends_on_its_own_is_merged(timm: Any) -> None:
    x = pixels(3)
    merged = tomepass.apply(timm, METHOD, example_inputs=x)
    for _ in range(2):
        features = merged.forward_features(x)
        assert relative_error(merged.forward_head(features), merged(x)) < 1e-5
    assert relative_error(features[:, 0], timm.forward_features(x)[:, 0]) > 1e-2
    assert len(merged._captures) == 2
    assert relative_error(merged.embedding(x[:1]), features[:1, 0]) < 1e-5
    assert torch.equal(merged.forward_features(x=x[:2]), merged.forward_features(x[:2]))
    assert len(merged._captures) == 2


@torch.no_grad()
def test_short_outputs_of_a_method(timm: Any) -> None:
    merged = tomepass.apply(timm, METHOD, example_inputs=pixels(), outputs="merged")
    assert merged.forward_features(pixels()).shape[1] == 37 - 10


@torch.no_grad()
def test_an_adaptive_model_merges_methods_too(timm: Any) -> None:
    method = ToMe([6, 4], adaptive=(0.55, 0.75))
    merged = tomepass.apply(timm, method, example_inputs=pixels(4))
    features = merged.forward_features(pixels(4))
    assert relative_error(merged.forward_head(features), merged(pixels(4))) < 1e-5


@torch.no_grad()
def test_methods_that_call_the_forward_merge_through_it(sentences: Any) -> None:
    model, merged = sentences
    images = list(pixels(5))
    expected = merged(torch.stack(images))
    assert relative_error(merged.encode(images), expected) < 1e-5
    assert relative_error(merged.encode_by_forward(images), expected) < 1e-5
    assert relative_error(model.encode(images), expected) > 1e-2
    assert merged.probabilities(pixels()).shape == (2, 1, 5)  # a softmax that is no attention
    assert merged.sizes() == model.sizes()
    assert len(merged._captures) == 1


@torch.no_grad()
def test_a_method_that_cannot_be_captured_says_so_once(sentences: Any) -> None:
    model, merged = sentences
    images = [image.numpy() for image in pixels(3)]
    with pytest.warns(UserWarning, match=r"Sentences\.encode_beside runs unmerged") as told:
        got = merged.encode_beside(images)
    assert len(told) == 1
    assert torch.equal(got, model.encode_beside(images))
    assert torch.equal(merged.encode_beside(images), got)


@torch.no_grad()
def test_a_method_that_gives_the_forward_what_no_capture_takes(sentences: Any) -> None:
    model, merged = sentences
    with pytest.warns(UserWarning, match="runs unmerged.*holds an instance of object") as told:
        got = merged.generate(pixels())
    assert torch.equal(got, model.generate(pixels()))
    assert torch.equal(merged.generate(pixels()), got)
    assert len(told) == 1


@torch.no_grad()
def test_a_method_of_text_that_is_never_merged() -> None:
    class Two(Timm):
        def __init__(self, **choices: Any) -> None:
            super().__init__(**choices)
            self.text = near(Causal)(16)

        def text_features(self, x: Tensor) -> Tensor:
            return self.text(x)[:, -1]

    model = make(Two)
    merged = tomepass.apply(model, METHOD, example_inputs=pixels())
    x = torch.randn(2, 9, 16)
    with pytest.warns(UserWarning, match="text_features runs unmerged.*causal"):
        got = merged.text_features(x)
    assert torch.equal(got, model.text_features(x))


@torch.no_grad()
def test_methods_of_a_module_within_and_functions_set_on_the_model(timm: Any) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.features = lambda x: inner.forward_features(x)

        def forward(self, pixels: Tensor) -> Any:
            return self.inner(pixels)

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

    x = pixels()
    expected = tomepass.apply(timm, METHOD, example_inputs=x)(x)
    merged = tomepass.apply(Wrapped(timm), METHOD, example_inputs=x)
    for name in ("forward_features", "features"):
        found = timm.forward_head(getattr(merged, name)(x))
        assert relative_error(found, expected) < 1e-5, name


@torch.no_grad()
@pytest.mark.parametrize("spelled", at_hand(["fused", "softmax", "module"], ["softmax"]))
def test_attention_is_seen_however_it_is_spelled(spelled: str) -> None:
    class Spelled(Timm):
        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            if spelled == "fused":
                x = nn.functional.scaled_dot_product_attention(x, x, x)
            elif spelled == "softmax":
                x = (x @ x.transpose(1, 2)).softmax(-1).to(x.dtype) @ x
            else:
                x = self.pool(x, x, x, need_weights=False)[0]
            return super().forward_head(x)

    model = make(Spelled)
    model.pool = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    merged = tomepass.apply(model, METHOD, example_inputs=pixels(), on_unmatched="warn")
    with pytest.warns(UserWarning, match="unmerged"):
        merged.forward_head(torch.randn(2, 37, 16))


@torch.no_grad()
def test_methods_in_a_compiled_region(timm: Any) -> None:
    x = pixels()
    merged = tomepass.apply(timm, METHOD, example_inputs=x)
    fast = torch.compile(merged.forward_features, backend="eager", fullgraph=True)
    with pytest.raises(TomeError, match=r"call merged\.forward_features\(\.\.\.\) once"):
        fast(x)
    expected = merged.forward_features(x)
    torch._dynamo.reset()
    assert relative_error(fast(x), expected) < 1e-5
    broken = torch.compile(lambda x: merged.forward_features(x) * 2, backend="eager")
    assert relative_error(broken(x), expected * 2) < 1e-5


def test_a_method_is_one_of_the_merged_model(sentences: Any) -> None:
    _, merged = sentences
    assert merged.encode.__self__ is merged
    assert merged.encode.__name__ == "encode"
    assert called_through(merged, "encode", merged.encode).__doc__ == merged.encode.__doc__
