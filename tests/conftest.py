"""What all tests share: tiny models, and a Dynamo that forgets between tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Triton reads this when it is imported, which importing Dynamo does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch._dynamo
import torch.utils._pytree as pytree
from zoo import CORE, FAMILIES, installed, make_inputs, make_model

from tomepass import module
from tomepass.capture import capture_module

__all__ = ["FAMILIES", "make_inputs", "make_model"]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Dynamo compiles a code object eight times at most: the tests must not add up."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pytest_collection_finish() -> None:
    """What was imported stays: else each full collection walks through all of PyTorch again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves out tests on a GPU where there is none, and interpreted ones where there is one."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def _versions(request: pytest.FixtureRequest) -> None:
    """Leaves out a family whose entry in the table needs newer versions than are installed."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    if name in FAMILIES and not installed(FAMILIES[name].needs):
        pytest.skip(f"needs {FAMILIES[name].needs}")


@pytest.fixture(params=CORE)
def family(request: pytest.FixtureRequest) -> str:
    """Each of the core families in turn, by name."""
    return str(request.param)


@pytest.fixture(scope="session")
def shared_models() -> dict[str, Any]:
    """One model of each family for tests that leave it as it is."""
    return _Models()


@pytest.fixture(autouse=True)
def _captured_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared models are captured once for each kind of call: a capture is never changed."""
    if "shared_models" not in request.fixturenames:
        return

    def capture(model: Any, call: dict[str, Any], forward: str = "forward") -> Any:
        modes = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), model.training)
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        key = (id(model), forward, *modes, attention, _shapes(call))
        if key not in _CAPTURES:
            _CAPTURES[key] = (model, capture_module(model, call, forward))  # the model keeps its id
        return _CAPTURES[key][1]

    monkeypatch.setattr(module, "capture_module", capture)


_CAPTURES: dict[Any, Any] = {}


def _shapes(value: Any) -> Any:
    """A call up to its tensors' values; their first dimension tells the batch apart."""
    leaves, form = pytree.tree_flatten(value)
    told = [(v.shape, v.dtype) if isinstance(v, torch.Tensor) else v for v in leaves]
    return str(form), str(told)


class _Models(dict[str, Any]):
    """Made when they are asked for."""

    def __missing__(self, name: str) -> Any:
        self[name] = make_model(name)
        return self[name]


@pytest.fixture
def vit() -> Any:
    """A fresh ViT classifier."""
    return make_model("vit")


@pytest.fixture
def images() -> torch.Tensor:
    """Two images for it: ``[2, 3, 32, 32]``."""
    return make_inputs("vit")["pixel_values"]
