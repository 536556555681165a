"""A model that changes after it was captured is captured again, and only then."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from depth import at_hand
from encoders import Block, Encoder, make, pixels
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import tomepass
from tomepass import TomeError
from tomepass.handover.captures import Captures

STRENGTH = 1.0


class Settings:
    """A configuration as somebody might write one."""

    def __init__(self) -> None:
        self.scale = 1.0
        self.nested = {"shift": [0.0, 1.0]}

    @property
    def doubled(self) -> float:
        return 2 * self.scale


class Reader(Encoder):
    """Reads everything that a forward can read."""

    factor = 1.0

    def __init__(self, **choices: Any) -> None:
        super().__init__(depth=1, **choices)
        self.flag = False
        self.settings = Settings()
        self.space = types.SimpleNamespace(shift=0.0)
        self.table = {"scale": 1.0, "pair": (1.0, [0.0])}
        self.unregistered = [nn.Linear(16, 16)]
        self.more = nn.ModuleList([nn.Linear(16, 16)])
        self.drop = nn.Dropout(0.5)
        self.shift: Tensor | None = None
        self.calls = 0
        self.log: list[Any] = []
        self.seen: Any = None

    def read(self, x: Tensor) -> Any:
        self.calls += 1
        self.log.append(x.shape)
        self.seen = x
        x = x * self.settings.doubled + self.settings.nested["shift"][0] + self.space.shift
        x = x * self.table["scale"] + self.table["pair"][1][0]
        for layer in [*self.unregistered, *self.more]:
            x = x + layer(x)
        if self.flag:
            x = x.flip(-1)
        if self.shift is not None:
            x = x + self.shift
        if hasattr(self, "late"):
            x = x - 1
        return self.extra(self.drop(super().read(x))) * self.factor * STRENGTH

    def extra(self, x: Tensor) -> Tensor:
        return x


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@contextlib.contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    missing = object()
    before = owner.__dict__.get(name, missing) if name in vars(owner) else missing
    before = before if before is not missing else getattr(owner, name, missing)
    own = name in vars(owner) or name in getattr(owner, "_modules", {})
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def _item(owner: Any, key: Any, value: Any) -> Iterator[None]:
    before, owner[key] = owner[key], value
    try:
        yield
    finally:
        owner[key] = before


@contextlib.contextmanager
def _handle(register: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
    handle = register(*args, **kwargs)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _pruned(model: Any) -> Iterator[None]:
    weight = model.head.weight.detach().clone()
    prune.l1_unstructured(model.head, "weight", amount=0.5)
    try:
        yield
    finally:
        prune.remove(model.head, "weight")
        model.head.weight = nn.Parameter(weight)


@contextlib.contextmanager
def _parametrized(model: Any) -> Iterator[None]:
    parametrize.register_parametrization(model.head, "weight", Doubled())
    try:
        yield
    finally:
        parametrize.remove_parametrizations(model.head, "weight", leave_parametrized=False)


@contextlib.contextmanager
def _spectral(model: Any) -> Iterator[None]:
    parametrizations.spectral_norm(model.head)
    try:
        yield
    finally:
        parametrize.remove_parametrizations(model.head, "weight", leave_parametrized=False)


@contextlib.contextmanager
def _training(model: Any) -> Iterator[None]:
    model.drop.train()
    try:
        yield
    finally:
        model.drop.eval()


@contextlib.contextmanager
def _another_class(model: Any) -> Iterator[None]:
    class Other(type(model)):  # type: ignore[misc]
        def extra(self, x: Tensor) -> Tensor:
            return x - 2

    before, model.__class__ = model.__class__, Other
    try:
        yield
    finally:
        model.__class__ = before


def _other_settings() -> Settings:
    settings = Settings()
    settings.scale = 3.0
    return settings


def _forward_of(layer: Any) -> Any:
    return functools.partial(lambda module, x: nn.Linear.forward(module, x) + 1, layer)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a flag": lambda m: _set(m, "flag", True),
    "a number of a configuration": lambda m: _set(m.settings, "scale", 2.0),
    "a list in a configuration": lambda m: _item(m.settings.nested["shift"], 0, 1.0),
    "another configuration": lambda m: _set(m, "settings", _other_settings()),
    "a namespace": lambda m: _set(m.space, "shift", 1.0),
    "an entry of a dict": lambda m: _item(m.table, "scale", 2.0),
    "a list in a tuple in a dict": lambda m: _item(m.table["pair"][1], 0, 1.0),
    "a layer in a list": lambda m: _item(m.unregistered, 0, nn.Linear(16, 16)),
    "one layer more": lambda m: _set(m, "more", nn.ModuleList([*m.more, nn.Linear(16, 16)])),
    "a new head": lambda m: _set(m, "head", nn.Linear(16, 7)),
    "a block": lambda m: _item(m.blocks, 0, make(lambda: Block(16, norm="post"))),
    "a part of a block": lambda m: _set(m.blocks[0], "norm2", nn.Identity()),
    "a tensor for None": lambda m: _set(m, "shift", torch.ones(16)),
    "what was not there": lambda m: _set(m, "late", 1),
    "an attribute of the class": lambda m: _set(Reader, "factor", 2.0),
    "a method of the class": lambda m: _set(Reader, "extra", lambda self, x: x + 1),
    "a method of the object": lambda m: _set(m, "extra", lambda x: x + 1),
    "a forward of an object": lambda m: _set(m.head, "forward", _forward_of(m.head)),
    "another class": _another_class,
    "a hook": lambda m: _handle(m.head.register_forward_hook, lambda _m, _i, o: o + 1),
    "a hook before": lambda m: _handle(
        m.head.register_forward_pre_hook, lambda _m, inputs: (inputs[0] + 1,)
    ),
    "a hook on all": lambda m: _handle(
        nn.modules.module.register_module_forward_hook,
        lambda module, _i, o: o + 1 if isinstance(module, nn.GELU) else None,
    ),
    "a number of the module": lambda m: _item(globals(), "STRENGTH", 2.0),
    "pruning": _pruned,
    "a parametrization": _parametrized,
    "spectral norm": _spectral,
    "dropout": _training,
}


@pytest.fixture(scope="module")
def reader() -> tuple[Any, Any]:
    """A model and the same with nothing merged: then both must agree to the bit."""
    model = make(Reader)
    return model, tomepass.apply(model, r=0, example_inputs=pixels())


def seeded(model: Any) -> Tensor:
    with torch.no_grad():
        torch.manual_seed(0)
        return model(pixels())  # type: ignore[no-any-return]


# The others are changes of the same kinds: every time one of each two.
@pytest.mark.parametrize("name", at_hand(CHANGES, [*CHANGES][::2]))
def test_a_change_is_seen_and_its_undoing_too(name: str, reader: tuple[Any, Any]) -> None:
    model, merged = reader
    before = seeded(model)
    assert torch.equal(seeded(merged), before)
    with CHANGES[name](model):
        after = seeded(model)
        assert after.shape != before.shape or not torch.equal(after, before)
        torch.testing.assert_close(seeded(merged), after)
    known = len(merged._captures)
    assert torch.equal(seeded(merged), before)
    assert len(merged._captures) <= known + (name in ("pruning", "spectral norm"))


def test_merged_tokens_follow_a_change_too() -> None:
    model = make(Reader)
    merged = tomepass.apply(model, r=[6], example_inputs=pixels())
    before = merged(pixels())
    model.settings.scale = 2.0
    model.head.register_forward_hook(lambda _m, _i, o: o * 2)
    fresh = tomepass.apply(model, r=[6], example_inputs=pixels())(pixels())
    assert torch.equal(merged(pixels()), fresh)
    assert not torch.equal(before, fresh)


def captures_made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    new = Captures._new

    def counted(self: Captures, *args: Any) -> Any:
        made.append(args)
        return new(self, *args)

    monkeypatch.setattr(Captures, "_new", counted)
    return made


def test_what_the_forward_writes_itself_and_what_it_does_not_read_is_no_change(
    monkeypatch: pytest.MonkeyPatch, reader: tuple[Any, Any]
) -> None:
    model, merged = reader
    seeded(merged)
    made = captures_made(monkeypatch)
    for _ in range(3):
        seeded(model)  # counts its calls, logs shapes, keeps a tensor
        seeded(merged)
    model.unread = "something"
    model.note = nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert torch.equal(seeded(merged), seeded(model))
    assert not made
    assert model.calls > 3


class Counts(Encoder):
    def __init__(self) -> None:
        super().__init__(depth=1)
        self.calls = 0

    def read(self, x: Tensor) -> Any:
        self.calls += 1
        return super().read(x) * self.calls


def test_state_kept_from_call_to_call_is_refused() -> None:
    model = make(Counts)
    with pytest.raises(TomeError, match="keeps state from call to call in calls"):
        tomepass.apply(model, r=[4], example_inputs=pixels())
    assert model.calls == 0


def test_a_value_that_a_hook_closes_over_is_seen() -> None:
    model = make(Encoder, depth=1)
    by = [2.0]
    scale = 1.0

    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return output * scale * by[0]

    model.head.register_forward_hook(hook)
    merged = tomepass.apply(model, r=0, example_inputs=pixels())
    assert torch.equal(merged(pixels()), model(pixels()))
    by[0] = 3.0
    assert torch.equal(merged(pixels()), model(pixels()))
    scale = 5.0
    assert torch.equal(merged(pixels()), model(pixels()))


def test_compiled_code_asks_too() -> None:
    model = make(Reader)
    merged = tomepass.apply(model, r=[4], example_inputs=pixels())
    compiled = torch.compile(merged, fullgraph=True, backend="eager")
    before = compiled(pixels())
    model.flag = True
    with pytest.raises(TomeError, match="the model has changed since"):
        compiled(pixels())
    merged.prepare(pixels())
    assert torch.equal(compiled(pixels()), merged(pixels()))
    assert not torch.equal(compiled(pixels()), before)
    model.flag = False
    assert torch.equal(compiled(pixels()), before)
