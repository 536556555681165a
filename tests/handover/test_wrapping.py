"""A merged model in the place of the model: whoever asks gets the model's answers."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from depth import at_hand
from encoders import Attention, Encoder, make, near, pixels
from torch import Tensor, nn
from zoo import make_inputs, make_model, relative_error

import tomepass
from tomepass import MergedModel, ToMe, TomeError
from tomepass.handover.adaptive import AdaptiveModel
from tomepass.methods import Method

KINDS: dict[str, Method] = {"merged": ToMe([6]), "adaptive": ToMe([6], adaptive=(0.55, 0.75))}


# Half a model is two captures: the other tests of it are those of `test_adaptive.py`.
@pytest.fixture(params=at_hand(KINDS, ["merged"]))
def method(request: pytest.FixtureRequest) -> Method:
    return KINDS[request.param]


@pytest.fixture
def encoder() -> Any:
    return make()


@pytest.fixture
def merged(method: Method, encoder: Any) -> Any:
    """Either kind over a fresh encoder."""
    return tomepass.apply(encoder, method, example_inputs=pixels(4))


def other_weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value * 1.5 for name, value in module.state_dict().items()}


def expected(method: Method, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """What the method gives on a model made with other weights."""
    model = make()
    model.load_state_dict(weights)
    merged: Tensor = tomepass.apply(model, method, example_inputs=x)(x)
    return merged


# State: there is one


def test_it_has_the_models_state_and_no_more(merged: Any, encoder: Any) -> None:
    assert list(merged.state_dict()) == list(encoder.state_dict())
    assert dict(merged.named_buffers()).keys() == dict(encoder.named_buffers()).keys()
    assert [n for n, _ in merged.named_modules()] == [n for n, _ in encoder.named_modules()]
    pairs = zip(merged.parameters(), encoder.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)
    assert sum(1 for _ in nn.Sequential(merged, nn.Identity()).parameters()) == sum(
        1 for _ in encoder.parameters()
    )


@torch.no_grad()
def test_casts_move_the_model(merged: Any, encoder: Any) -> None:
    x = pixels(4)
    before = merged(x)
    assert merged.double() is merged
    assert encoder.head.weight.dtype == torch.float64
    assert relative_error(merged(x.double()), before) < 1e-4
    outer = nn.Sequential(merged).to(torch.bfloat16)
    assert encoder.head.weight.dtype == torch.bfloat16
    assert outer(x.bfloat16()).dtype == torch.bfloat16
    merged.float().half()
    assert encoder.head.weight.dtype == torch.float16


def test_modes_gradients_and_functions_reach_the_model(merged: Any, encoder: Any) -> None:
    outer = nn.Sequential(merged)
    outer.train()
    assert encoder.training
    assert encoder.blocks.training
    outer.eval()
    assert not encoder.training
    merged(pixels(4)).sum().backward()
    assert encoder.head.weight.grad is not None
    merged.zero_grad()
    assert encoder.head.weight.grad is None
    merged.requires_grad_(False)
    assert not any(p.requires_grad for p in encoder.parameters())
    merged.share_memory()
    assert encoder.head.weight.is_shared()
    seen: list[str] = []
    merged.apply(lambda module: seen.append(module._get_name()))
    theirs: list[str] = []
    encoder.apply(lambda module: theirs.append(module._get_name()))
    assert seen == theirs


@torch.no_grad()
def test_weights_loaded_anywhere_are_read(merged: Any, method: Method, encoder: Any) -> None:
    x = pixels(4)
    weights = other_weights(encoder)
    after = expected(method, weights, x)
    called = torch.func.functional_call(merged, weights, (x,))
    assert relative_error(called, after) < 1e-5
    assert relative_error(merged(x), after) > 1e-2
    with pytest.raises(RuntimeError, match="Missing key"):
        merged.load_state_dict({})
    nn.Sequential(merged).load_state_dict({f"0.{n}": v for n, v in weights.items()})
    assert relative_error(merged(x), after) < 1e-5
    merged.load_state_dict(weights, assign=True)
    assert encoder.head.weight.data_ptr() == weights["head.weight"].data_ptr()
    assert relative_error(merged(x), after) < 1e-5


def test_hooks_of_loading_run_once_wherever_it_is_loaded(merged: Any, encoder: Any) -> None:
    seen: list[str] = []
    encoder._register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
    encoder.register_state_dict_post_hook(lambda *_: seen.append("save"))
    state = merged.state_dict()
    merged.load_state_dict(state)
    assert seen == ["save", "load"]
    nn.Sequential(merged).load_state_dict({f"0.{n}": v for n, v in state.items()})
    assert seen == ["save", "load", "load"]


def replicated(net: nn.Module, factor: float) -> Any:
    """What DataParallel makes for a device, here with other weights."""
    parts = list(net.modules())
    copies: dict[nn.Module, Any] = {m: m._replicate_for_data_parallel() for m in parts}
    for part in parts:
        for name, child in part._modules.items():
            setattr(copies[part], name, None if child is None else copies[child])
        for name, value in part._parameters.items():
            setattr(copies[part], name, None if value is None else (value * factor).detach())
    return copies[net]


@torch.no_grad()
def test_a_replica_reads_its_own_weights(merged: Any, method: Method, encoder: Any) -> None:
    x = pixels(4)
    before, captures = merged(x), len(merged._captures)
    twin = replicated(merged, 1.5)
    after = expected(method, other_weights(encoder), x)
    assert relative_error(twin(x), after) < 1e-5
    assert len(merged._captures) == captures
    assert torch.equal(merged(x), before)


def _saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [lambda m: pickle.loads(pickle.dumps(m)), _saved, copy.deepcopy])
@torch.no_grad()
def test_copies_stand_on_their_own(
    copied: Callable[[Any], Any], merged: Any, encoder: Any, method: Method
) -> None:
    x = pixels(4)
    merged.note = "kept"
    before = merged(x)
    twin = copied(merged)
    assert type(twin).__mro__[1] is type(merged).__mro__[1]
    assert twin.note == "kept"
    assert torch.equal(twin(x), before)
    twin.head.bias.add_(1.0)
    torch.testing.assert_close(twin(x), before + 1)
    assert torch.equal(merged(x), before)


@torch.no_grad()
def test_no_image_gives_no_result(method: Method) -> None:
    class Plain(Attention):
        def heads(self, x: Tensor) -> Any:
            return tuple(
                part(x).view(*x.shape[:2], 2, x.shape[2] // 2).transpose(1, 2)
                for part in (self.q, self.k, self.v)
            )

    model, x = make(blocks=[near(Plain)]), pixels(4)
    assert model(x[:0]).shape == (0, 5)
    merged = tomepass.apply(model, method, example_inputs=x)
    assert merged(x[:0]).shape == (0, 5)
    assert merged(x).shape == (4, 5)


def test_hooks_of_the_merged_model_run(merged: Any, encoder: Any) -> None:
    seen: list[Any] = []
    handle = merged.register_forward_hook(lambda module, inputs, output: seen.append(output))
    got = merged(pixels(4))
    assert seen[0] is got
    handle.remove()
    assert not encoder._forward_hooks


# Attributes: the model's


class Curious(Encoder):
    """Has attributes of every kind, some named as ours."""

    kind = "a class's"
    limits = (1, 2)

    def __init__(self, **choices: Any) -> None:
        super().__init__(**choices)
        self.source, self.outputs, self.method = "web", ["a"], "x"
        self.kind = "an instance's"
        self.scale = 1.0
        self.register_buffer("table", torch.zeros(3))

    @property
    def bits(self) -> int:
        return self.__dict__.setdefault("_bits", 8)

    @bits.setter
    def bits(self, value: int) -> None:
        self._bits = value

    @classmethod
    def named(cls, name: str) -> tuple[type[Any], str]:
        return cls, name

    def me(self) -> Any:
        return self

    def report(self) -> str:
        return f"{self.method} {self.source}"

    def forward(self, pixels: Tensor) -> Any:
        return super().forward(pixels * self.scale)


@pytest.fixture
def curious(method: Method) -> Any:
    with pytest.warns(UserWarning, match="named as some of a merged model's: method"):
        return tomepass.apply(make(Curious), method, example_inputs=pixels(4))


def test_the_models_names_are_the_models(curious: Any, method: Method) -> None:
    assert (curious.source, curious.outputs, curious.method) == ("web", ["a"], "x")
    assert curious.report() == "x web"
    assert type(curious).original.__name__ == "original"
    assert MergedModel.method(curious) == method
    curious.source = "disk"
    assert curious.report() == "x disk"
    # All that the package does itself goes on.
    assert tomepass.export(curious, ToMe([6]), example_inputs=pixels(4)).module() is not None


def test_attributes_are_read_from_the_model(curious: Any) -> None:
    model = MergedModel.original(curious)
    assert curious.kind == "an instance's"
    assert curious.limits == (1, 2)
    assert curious.bits == 8
    assert curious.named("a") == (Curious, "a")
    assert curious.me() is curious
    assert curious.table is model.table
    model.limits = (3,)
    assert curious.limits == (3,)
    assert {"kind", "limits", "bits", "head", "forward"} <= set(dir(curious))
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = curious.no_such_thing


@torch.no_grad()
def test_attributes_are_written_to_the_model(curious: Any) -> None:
    model, x = MergedModel.original(curious), pixels(4)
    before = curious(x)
    curious.bits, curious.limits, curious.scale = 4, (9,), 2.0
    assert (model.bits, model.limits, model.scale) == (4, (9,), 2.0)
    assert not torch.equal(curious(x), before)  # the forward reads it
    curious.head = nn.Linear(16, 3)
    assert model.head is curious.head
    assert curious(x).shape == (4, 3)
    curious.table = torch.ones(3)
    assert torch.equal(model.table, torch.ones(3))
    del curious.scale
    assert not hasattr(model, "scale")
    curious.note = 1
    assert not hasattr(model, "note")
    del curious.note
    assert not hasattr(curious, "note")


def test_what_is_fixed_is_not_written(merged: Any) -> None:
    with pytest.raises(AttributeError, match="apply tomepass again"):
        merged.method = ToMe(3)


@pytest.mark.parametrize("method", KINDS, indirect=True)
def test_it_answers_with_the_models_class(merged: Any, encoder: Any, method: Method) -> None:
    assert isinstance(merged, Encoder)
    assert isinstance(merged, MergedModel if method.adaptive is False else AdaptiveModel)
    assert merged.__class__ is Encoder
    assert type(merged).__name__ == "Encoder"
    assert inspect.signature(merged.forward) == inspect.signature(encoder.forward)
    assert not isinstance(encoder, MergedModel)


class Stack(nn.Sequential):
    """A container, and an override of what every module has."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.moved = True
        return super().to(*args, **kwargs)


def test_containers_and_overrides_are_the_models(method: Method) -> None:
    stack = Stack(nn.Identity(), make())
    merged = tomepass.apply(stack, method, example_inputs=pixels(4))
    assert len(merged) == 2
    assert merged[1] is stack[1]
    assert list(merged) == list(stack)
    assert merged.to(torch.float64) is merged
    assert merged.moved
    assert stack[1].head.weight.dtype == torch.float64


@torch.no_grad()
def test_a_parametrization_of_the_models_own_parameter(merged: Any, encoder: Any) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    x = pixels(4)
    before = merged(x)
    torch.nn.utils.parametrize.register_parametrization(merged, "positions", Double())
    assert torch.equal(merged.positions, encoder.positions)
    assert relative_error(merged(x), before) > 1e-2
    plain = make()
    plain.positions.mul_(2)
    method = MergedModel.method(merged)
    theirs = tomepass.apply(plain, method, example_inputs=x)(x)
    assert relative_error(merged(x), theirs) < 1e-5


# Calls


class Passing(nn.Module):
    """Names none of its inputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Shifted(Encoder):
    def forward(self, pixels: Tensor, *shifts: Tensor, scale: float = 1.0) -> Any:
        return super().forward(scale * sum(shifts, pixels))


@torch.no_grad()
def test_inputs_that_have_no_name(method: Method) -> None:
    x = pixels(4)
    encoder = make()
    plain = tomepass.apply(encoder, method, example_inputs=x)(x)
    passing = tomepass.apply(Passing(encoder), method, example_inputs=x)
    assert torch.equal(passing(x), plain)
    assert torch.equal(passing(pixels=x), plain)
    shifted = tomepass.apply(make(Shifted), method, example_inputs=x)
    assert torch.equal(shifted(x), plain)
    moved = x.flip(0)
    assert torch.equal(shifted(x - moved, moved, scale=1.0), shifted(x - moved + moved))


def test_an_input_without_dimensions() -> None:
    model, y = make_model("vit"), torch.tensor([0, 1])
    call = {**make_inputs("vit"), "labels": y, "num_items_in_batch": torch.tensor(4)}
    merged = tomepass.apply(model, r=0)
    assert torch.equal(merged(**call).loss, model(**call).loss)
    call["num_items_in_batch"] = torch.tensor(8)
    assert torch.equal(merged(**call).loss, model(**call).loss)


@pytest.mark.parametrize(
    "trace",
    [
        lambda model, x: torch.jit.trace(model, x),
        lambda model, x: torch.fx.symbolic_trace(model),
        lambda model, x: torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False),
    ],
)
def test_tracing_is_refused_by_its_name(trace: Callable[..., Any], merged: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TomeError, match=r"cannot be traced[^$]*tomepass\.export"):
            trace(merged, pixels(4))


def test_an_object_among_the_inputs_is_refused(merged: Any) -> None:
    with pytest.raises(TomeError, match="holds an instance of object"):
        merged(pixels(4), cache=object())


def test_saving_says_how_it_was_merged(method: Method, tmp_path: Any) -> None:
    merged = tomepass.apply(make_model("vit"), method)
    merged.save_pretrained(tmp_path)
    again = tomepass.load(tmp_path)
    assert isinstance(again, transformers.ViTForImageClassification)
    assert again.method == method
    x = make_inputs("vit")["pixel_values"]
    assert torch.equal(again(x).logits, merged(x).logits)
