"""The store of captures: threads, a bound, batches, and what runs where none can be made."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from depth import at_hand
from encoders import Encoder, make, pixels
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import tomepass
from tomepass import TomeError
from tomepass.model.alone import exporting


class Sizes(Encoder):
    """Takes images of any size."""

    def __init__(self, **choices: Any) -> None:
        super().__init__(depth=1, **choices)

    def embed(self, images: Tensor) -> Tensor:
        if images.shape[-1] % 4:
            raise ValueError("no whole patches")
        x = self.patches(images).flatten(2).transpose(1, 2)
        return x + self.positions[:, : x.shape[1]]


def in_threads(works: list[Callable[[], Any]]) -> list[Any]:
    """What each gives, or the error it raises, all begun at once."""
    results: list[Any] = [None] * len(works)
    barrier = threading.Barrier(len(works))

    def run(place: int) -> None:
        barrier.wait()
        try:
            results[place] = works[place]()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def tensors_of(model: nn.Module) -> list[Tensor]:
    plain = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    return [*model.parameters(), *model.buffers(), *plain]


def soak(threads: int, sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...], calls: int) -> None:
    models = {dtype: make(Sizes, start=0).to(dtype) for dtype in dtypes}
    merged = {dtype: tomepass.apply(model, r=[2]) for dtype, model in models.items()}
    images = {
        (size, dtype): torch.randn(2, 3, size, size).to(dtype) for size in sizes for dtype in dtypes
    }

    def work(number: int) -> Callable[[], Any]:
        def run() -> dict[Any, Tensor]:
            answers = {}
            for call in range(calls):
                size = sizes[(number + call) % len(sizes)]
                dtype = dtypes[number % len(dtypes)]
                with torch.no_grad():
                    answers[size, dtype] = merged[dtype](images[size, dtype])
                    models[dtype](images[size, dtype])  # served unmerged meanwhile
                with pytest.raises(TomeError, match="no whole patches"):
                    merged[dtype](torch.randn(2, 3, 9 + number % 2, 9).to(dtype))
            return answers

        return run

    results = in_threads([work(number) for number in range(threads)])
    assert not [r for r in results if isinstance(r, BaseException)]
    assert not torch.compiler.is_compiling()
    assert not torch.compiler.is_exporting()
    for dtype, model in models.items():
        assert not any(isinstance(t, FakeTensor) for t in tensors_of(model))
        assert len(merged[dtype]._captures) == len(sizes)
    for answers in results:
        for (size, dtype), got in answers.items():
            assert type(got) is Tensor
            with torch.no_grad():
                alone = tomepass.apply(models[dtype], r=[2])(images[size, dtype])
            torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)
        break  # the others gave the same, or:
    first = {key: value for answers in results for key, value in answers.items()}
    for answers in results:
        for key, value in answers.items():
            # Products round by where their operands lie in memory, in the model as well.
            torch.testing.assert_close(value, first[key], rtol=1e-5, atol=1e-5)


def test_threads_share_captures_and_leave_the_process_as_it_was() -> None:
    soak(6, (16, 24), (torch.float32,), calls=1)


@pytest.mark.deep
def test_many_threads_sizes_and_dtypes() -> None:
    soak(16, (12, 16, 20, 24), (torch.float32, torch.float64), calls=3)


def test_a_thread_is_not_exported_because_another_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", True)
    assert not exporting()


def test_a_failed_capture_leaves_the_model_as_it_was() -> None:
    class Fails(Encoder):
        def read(self, x: Tensor) -> Any:
            self.seen = x
            self.first.grad = None
            self.log.append(x)
            if x.sum() > 0:
                raise ValueError("positive")
            return x

    model = make(Fails, depth=1)
    model.log = []
    before = {name: (id(t), type(t)) for name, t in model.named_parameters()}
    with pytest.raises(TomeError, match="could not capture"):
        tomepass.apply(model, r=[4], example_inputs=pixels())
    assert before == {name: (id(t), type(t)) for name, t in model.named_parameters()}
    assert not model.log
    assert not hasattr(model, "seen")
    assert type(super(Fails, model).read(torch.randn(1, 37, 16))) is Tensor


def test_the_captures_longest_out_of_use_go_first() -> None:
    model = make(Sizes, start=0)
    merged = tomepass.apply(model, r=[2])
    merged._captures.limit = 2
    images = {size: torch.randn(2, 3, size, size) for size in (12, 16, 20)}
    for size in (12, 16, 12, 20):
        merged(images[size])
    sizes = [applied.capture.example[0].shape[-1] for applied in merged._captures]
    assert sorted(sizes) == [12, 20]


# Batches


class WithMeans(Encoder):
    def __init__(self) -> None:
        super().__init__(depth=1)

    def forward(self, images: Tensor, mean: Tensor) -> Any:  # type: ignore[override]
        return super().forward(images - mean[:, None, None])


@pytest.mark.parametrize("first", at_hand([2, 3], [3]))
def test_an_input_that_is_as_long_as_the_batch_need_not_be_batched(first: int) -> None:
    model, mean = make(WithMeans), torch.tensor([0.1, 0.2, 0.3])
    merged = tomepass.apply(model, r=0, example_inputs=(pixels(first), mean))
    for batch in (2, 3, 4):
        assert torch.equal(merged(pixels(batch), mean), model(pixels(batch), mean))
    assert len(merged._captures) == 1


class CountsImages(Encoder):
    """Decides by the batch size, which no graph for every batch can."""

    def __init__(self) -> None:
        super().__init__(depth=1)

    def read(self, x: Tensor) -> Any:
        return [super(CountsImages, self).read(row[None]) for row in list(x)]


def test_a_batch_that_cannot_be_left_open_is_captured_size_by_size() -> None:
    model = make(CountsImages)
    merged = tomepass.apply(model, r=0, example_inputs=pixels(2))
    for batch in (2, 3, 2, 1):
        got, expected = merged(pixels(batch)), model(pixels(batch))
        assert len(got) == batch
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(merged._captures) == 3


# What cannot be captured


class Guarded(Encoder):
    def __init__(self) -> None:
        super().__init__(depth=1)
        self.guarded = True

    def embed(self, images: Tensor) -> Tensor:
        if self.guarded and torch.isnan(images).any():
            raise ValueError("NaN in the images")
        return super().embed(images)


class WritesItsState(Encoder):
    def __init__(self) -> None:
        super().__init__(depth=1)
        self.register_buffer("calls", torch.zeros(()))

    def embed(self, images: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().embed(images)


class Elsewhere(Encoder):
    """Computes something else while it is followed."""

    def __init__(self) -> None:
        super().__init__(depth=1)

    def read(self, x: Tensor) -> Any:
        y = super().read(x)
        return y if torch.compiler.is_compiling() else y * 1.01


@pytest.mark.parametrize("cls", [Guarded, WritesItsState, Elsewhere])
def test_warn_leaves_a_model_that_cannot_be_captured_unmerged(cls: type[Encoder]) -> None:
    model, images = make(cls), pixels()
    with pytest.raises(TomeError):
        tomepass.apply(model, r=[4], example_inputs=images)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        merged = tomepass.apply(model, r=[4], example_inputs=images, on_unmatched="warn")
        got = merged(images)
        merged(images[:1])
    assert torch.equal(got, model(images))
    assert sum("left unmerged" in str(w.message) for w in caught) == 1
    assert not merged.report(images).ok


def test_what_could_not_be_captured_is_tried_again_when_the_model_has_changed() -> None:
    model, images = make(Guarded), pixels()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = tomepass.apply(model, r=[4], example_inputs=images, on_unmatched="warn")
    model.guarded = False
    assert merged.report(images).ok


def test_a_capture_that_is_another_function_is_refused() -> None:
    with pytest.raises(TomeError, match=r"is another function.*output 0 .*differs by .*e-03"):
        tomepass.apply(make(Elsewhere), r=[4], example_inputs=pixels())


class OnlyForSome(Encoder):
    """Leaves the graph on inputs that a made-up example does not have."""

    def __init__(self) -> None:
        super().__init__(depth=1)

    def embed(self, images: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            images = images.clamp(max=100.0)
        return super().embed(images)


def test_the_first_real_inputs_count_too() -> None:
    model = make(OnlyForSome)
    merged = tomepass.apply(model, r=[4], example_inputs=pixels())
    with pytest.raises(TomeError, match="is another function"):
        merged(pixels() * 1000)


def test_random_numbers_are_drawn_alike_and_the_users_left_as_they_were() -> None:
    model = make(Encoder, depth=1)
    model.head = nn.Sequential(nn.Dropout(0.5), model.head).train()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    tomepass.apply(model, r=[4], example_inputs=pixels())
    assert torch.equal(torch.rand(3), expected)


def test_a_model_without_values_is_explained_and_merged() -> None:
    images = pixels().to("meta")
    model = make(Encoder, depth=1).to("meta")
    assert tomepass.explain(model, r=[4], example_inputs=images).ok
    got = tomepass.apply(model, r=[4], example_inputs=images)(images)
    assert got.is_meta
    assert got.shape == (2, 5)
